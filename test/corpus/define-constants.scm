(define %user "offload")
(define %key "/etc/guix/key")
(define %systems '("x86_64-linux" "i686-linux"))
(define %port 2222)

(list (build-machine (name "ada") (user %user) (private-key %key) (port %port)
                     (systems %systems)
                     (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
