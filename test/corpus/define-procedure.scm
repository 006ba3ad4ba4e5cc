(define (machine name key)
  "Return a machine called NAME."
  (build-machine
    (name (string-append name ".example.org"))
    (systems (list "x86_64-linux"))
    (user "offload")
    (host-key key)))

(list (machine "ada" "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
      (machine "bea" "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea"))
