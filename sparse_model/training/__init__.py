"""The trainer and what it uses: optimizer rules, losses, logs, interrupts, processes."""
