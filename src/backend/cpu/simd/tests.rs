//! Every kernel on every instruction set of this machine.
