(let loop ((i 3) (result '()))
  (if (= i 0) result
      (loop (- i 1)
            (cons (build-machine (name (string-append "n" (number->string i))) (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada"))
                  result))))
