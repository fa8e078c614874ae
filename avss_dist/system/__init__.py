"""This machine: devices, memory, versions, what works (doctor), and progress bars."""
