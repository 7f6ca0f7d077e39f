//! The control plane: configuration, command line, admin HTTP. One tokio thread.
