(define more-machine (build-machine
  (name "more")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBh4l84K/PILULorN9yoSpUbcEbyntWrlPAQYZ9p1uGJ root@more")))
(list more-machine)
