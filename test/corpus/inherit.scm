(define ada
  (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")(speed 1.7)(parallel-builds 4)))

(define ada-i686
  (build-machine (inherit ada)
    (systems '("i686-linux"))
    (parallel-builds 2)))

(list ada ada-i686 (build-machine (inherit ada-i686)))
