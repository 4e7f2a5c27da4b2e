"""Training loss: flow matching and the terms that a configuration adds."""
