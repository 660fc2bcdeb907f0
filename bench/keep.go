// What a careful user writes around a client that is one connection: keep several of them, and replace each in time.

package main

import "crypto/tls"

// keeper opens, uses and closes one client.
type keeper[C any] struct {
	dial func() (C, error)
	send func(c C, message []byte, n int64) error // message begins with header and is message n
	quit func(c C)                                // returns once the relay has closed too
}

// keep sends from j.Senders goroutines over at most j.Conns connections, each used j.Rotate times. A goroutine takes a connection
// from a channel, dials if it is new, sends, and puts it back. After an error it drops the connection; the message counts as
// failed.
func keep[C any](j job, src *source, t *tally, k keeper[C]) error {
	type slot struct {
		c    C
		open bool
		used int
	}
	free := make(chan *slot, j.Conns)
	for range j.Conns {
		free <- new(slot)
	}
	// Used connections come first, so that a single sender uses one connection.
	take := func() *slot { return <-free }
	give := func(s *slot) { free <- s }
	if j.Senders < j.Conns {
		lone := make(chan *slot, j.Conns)
		for range j.Senders {
			lone <- <-free
		}
		free = lone
	}
	eachSender(j, src, t, func() func(int64) error {
		var message []byte
		if !j.Stream {
			message = newMessage(j.Size)
		}
		return func(n int64) error {
			if message != nil {
				stamp(message, n)
			}
			s := take()
			defer give(s)
			if !s.open {
				c, err := k.dial()
				if err != nil {
					return err
				}
				*s = slot{c: c, open: true}
			}
			err := k.send(s.c, message, n)
			if s.used++; err != nil || s.used == j.Rotate {
				k.quit(s.c)
				s.open = false
			}
			return err
		}
	})
	close(free)
	for s := range free {
		if s.open {
			k.quit(s.c)
		}
	}
	return nil
}

// each sends every message over a new connection, at most j.Conns at a time.
func each(j job, src *source, t *tally, send func(message []byte, n int64) error) error {
	places := make(chan struct{}, j.Conns)
	eachSender(j, src, t, func() func(int64) error {
		message := newMessage(j.Size)
		return func(n int64) error {
			stamp(message, n)
			places <- struct{}{}
			defer func() { <-places }()
			return send(message, n)
		}
	})
	return nil
}

// clientTLS is the TLS configuration for clients that take one. The roots are the system's; SSL_CERT_FILE sets them to the
// relay's certificate.
func clientTLS(j job) *tls.Config {
	conf := &tls.Config{ServerName: j.Host}
	if j.Resume {
		conf.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	return conf
}
