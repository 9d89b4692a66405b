"""To study gradients: explain writes out the rules that a backward pass runs. They look at the engine from outside."""
