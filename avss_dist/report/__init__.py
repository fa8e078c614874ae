"""What people see: tables in the terminal, pictures, exports, the page."""
