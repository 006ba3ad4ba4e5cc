(use-modules (ice-9 textual-ports))
(list (build-machine (name "ada") (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
   (private-key (string-append "/k" (call-with-input-file "/etc/offload-corpus/files/empty" get-string-all)))))
