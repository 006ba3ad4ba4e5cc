(list (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (port 70000)) (build-machine
  (name "bea")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea") (port 0)) (build-machine
  (name "cyd")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMADZ50N1uXFOYv+YLhRQPqwCIqCkm3nI9sFpx/fEQOv root@cyd") (port "22")) (build-machine
  (name "dot")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOOS2tiwhZn3TUgZzSkf7vgatDieCm+uKxKG+ZQRsMfK root@dot")) (build-machine
  (name "eve")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIUmKt90UYu7cMfLlM1hWdkWaeWoHt8e/r1UPq29qfor root@eve") (port 22.5)))
