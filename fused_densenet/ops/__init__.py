"""The functional operators, their derivatives and the algorithm above the primitives."""
