(list (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (speed .5) (overload-threshold 0.)) (build-machine
  (name "bea")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea")(speed +1.25)) (build-machine
  (name "cyd")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMADZ50N1uXFOYv+YLhRQPqwCIqCkm3nI9sFpx/fEQOv root@cyd")(speed 00.10)))
