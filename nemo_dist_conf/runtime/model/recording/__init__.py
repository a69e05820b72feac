"""A constructor recorded without values, and the values played back tensor by tensor."""
