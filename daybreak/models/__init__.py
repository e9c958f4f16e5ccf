"""The families of models: parameters, forward, backward and decode of each, as straight lists of kernel calls."""
