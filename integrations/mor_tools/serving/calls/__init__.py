"""What callers send and get: completions and chat, their fields, and the grammars of answers."""
