"""The lean engine: layers that keep for the backward pass only what their gradients need.

Stock autograd keeps the input of a frozen convolution, of a frozen norm and of an activation. With frozen
weights the gradients need none of these: a convolution needs its weight, a norm its scale, a ReLU one bit
for each value (TinyTL, section 3.1).
"""
