"""CLAP: text and sound in one space. Configuration, modeling, features and processing."""
