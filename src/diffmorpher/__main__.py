from diffmorpher.cli.app import main

main()
