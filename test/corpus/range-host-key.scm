(list (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519")) (build-machine
  (name "bea")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "AAAAC3NzaC1lZDI1NTE5")) (build-machine
  (name "cyd")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMADZ50N1uXFOYv+YLhRQPqwCIqCkm3nI9sFpx/fEQOv root@cyd")) (build-machine
  (name "dot")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3Nza…")) (build-machine
  (name "eve")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIIUmKt90UYu7cMfLlM1hWdkWaeWoHt8e/r1UPq29qfor")))
