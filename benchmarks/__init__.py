"""What is measured, beside its peers. A package, so that no other one of this name is found instead."""
