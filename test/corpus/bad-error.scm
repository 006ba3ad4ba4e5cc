(error "no machines today:" 'sunday)
