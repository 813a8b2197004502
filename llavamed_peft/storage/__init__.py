"""Files read and written safely: completely or not at all, known by their content, and images."""
