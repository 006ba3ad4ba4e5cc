;; Prints what the procedure 'build-machines' of the real Guix makes of each
;; machine file named on the command line: a line of JSON each.  Every file gets
;; a process of its own, since they share a module.

(use-modules (guix scripts offload) (guix diagnostics) (guix ui)
             (ice-9 match) (srfi srfi-1))

(define build-machines (@@ (guix scripts offload) build-machines))
(define fresh-user-module
  (lambda ()
    (let ((module (make-fresh-user-module)))
      (module-use! module (resolve-interface '(guix scripts offload)))
      module)))

(define (escape char)
  (cond ((memv char '(#\" #\\)) (string #\\ char))
        ((char<? char #\space)
         (string-append "\\u" (string-pad (number->string (char->integer char)
                                                          16)
                                          4 #\0)))
        (else (string char))))

(define (json value)
  (match value
    (#t "true")
    (#f "false")
    ((? string?)
     (string-append "\"" (string-concatenate (map escape (string->list value)))
                    "\""))
    ((? exact-integer?) (number->string value))
    ((and (? real?) (? inf?)) (if (positive? value) "1e999" "-1e999"))
    ((and (? real?) (not (? nan?)))
     (number->string (exact->inexact value)))
    (#(pairs ...)
     (string-append "{" (string-join (map (match-lambda
                                            ((name . value)
                                             (string-append (json name) ": "
                                                            (json value))))
                                          pairs)
                                     ", ")
                    "}"))
    ((items ...)
     (string-append "[" (string-join (map json items) ", ") "]"))
    (_ (json (vector (cons "scheme" (object->string value)))))))

(define (plain value)
  (match value
    ((items ...) (map plain items))
    (#(_ ...) (vector (cons "scheme" (object->string value))))
    (_ value)))

(define fields
  ;; The exported accessors, and those that are not.
  `((name . ,build-machine-name)
    (port . ,build-machine-port)
    (systems . ,build-machine-systems)
    (user . ,build-machine-user)
    (private-key . ,build-machine-private-key)
    (host-key . ,build-machine-host-key)
    (compression . ,build-machine-compression)
    (compression-level
     . ,(@@ (guix scripts offload) build-machine-compression-level))
    (daemon-socket . ,build-machine-daemon-socket)
    (overload-threshold . ,build-machine-overload-threshold)
    (parallel-builds
     . ,(@@ (guix scripts offload) build-machine-parallel-builds))
    (speed . ,(@@ (guix scripts offload) build-machine-speed))
    (features . ,build-machine-features)))

(define (machine->json machine)
  (list->vector
   (map (match-lambda
          ((name . accessor)
           (cons (symbol->string name) (plain (accessor machine)))))
        fields)))

(define (exception-of file)
  "Return what evaluating FILE throws, or #f: as the reference catches it."
  (catch #t
    (lambda ()
      (save-module-excursion
       (lambda ()
         (set-current-module (fresh-user-module))
         (primitive-load file)
         #f)))
    list))

(define (exception->json args)
  (match args
    (#f #f)
    (('syntax-error _ message properties . _)
     (vector (cons "key" "syntax-error")
             (cons "message"
                   (string-append (location->string
                                   (source-properties->location properties))
                                  ": " message))))
    (((? symbol? key) _ (? string? message) (or (args ...) (and #f args)) . _)
     (vector (cons "key" (symbol->string key))
             (cons "message" (apply simple-format #f message (or args '())))))
    ((key . _)
     (vector (cons "key" (object->string key))
             (cons "message" (object->string args))))))

(define (describe file)
  (let* ((log (open-output-string))
         (machines (parameterize ((guix-warning-port log))
                     (catch 'quit
                       (lambda ()
                         (map machine->json (build-machines file)))
                       (const #f)))))
    (vector (cons "machines" machines)
            (cons "log" (get-output-string log))
            (cons "exception" (exception->json (exception-of file))))))

(define (print-description file)
  (let* ((output (fdopen (dup->fdes 1) "w"))
         (description (with-output-to-port (%make-void-port "w")
                        (lambda () (describe file)))))
    (set-port-encoding! output "UTF-8")
    (format output "~a: ~a~%" (json (basename file ".scm"))
            (json description))
    (force-output output)))

(for-each (lambda (file)
            (match (primitive-fork)
              (0
               (alarm 10)
               (setrlimit 'as (expt 2 31) (expt 2 31))
               (print-description file)
               (primitive-_exit 0))
              (pid
               (waitpid pid))))
          (cdr (command-line)))
