"""Reading a module: which tensors it has, what they are called, how it is wrapped, whether it has changed."""
