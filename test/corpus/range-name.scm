(list (build-machine
  (name "")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOOwxEKY/BwUmvv0yJlvuSQnrkHkZJuTTKSVmRt4UrhV root@")) (build-machine
  (name "../ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGAIgnlSTg/Wz1mUxkXd0fDwhND+9krhSJeBrrnLA7Yn root@../ada")) (build-machine
  (name "bea")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea")) (build-machine
  (name (quote cyd))
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMADZ50N1uXFOYv+YLhRQPqwCIqCkm3nI9sFpx/fEQOv root@cyd")))
