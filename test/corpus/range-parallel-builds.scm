(list (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (parallel-builds 0)) (build-machine
  (name "bea")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea") (parallel-builds -1)) (build-machine
  (name "cyd")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMADZ50N1uXFOYv+YLhRQPqwCIqCkm3nI9sFpx/fEQOv root@cyd") (parallel-builds "2")) (build-machine
  (name "dot")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOOS2tiwhZn3TUgZzSkf7vgatDieCm+uKxKG+ZQRsMfK root@dot")))
