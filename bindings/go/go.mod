module polar-sparsity/bindings/go

go 1.19
