"""Other libraries' private names, each behind a gate that closes when they change; nothing else in the package touches them."""
