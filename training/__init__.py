"""The recipe of the bundled model `mini`: data, autoencoder, text encoder and U-Net, figures. Start at README.md."""
