"""What every room may use: files, progress, checked choices, devices, memory."""
