"""What scores a response: reward models, functions, and what is made of several."""
