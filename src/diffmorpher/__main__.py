from diffmorpher.cli import main

main()
