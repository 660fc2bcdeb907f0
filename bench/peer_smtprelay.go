// This library.

package main

import (
	"context"
	"crypto/tls"
	"io"
	"net"

	"github.com/smtprelay/smtprelay"
)

func smtprelayConfig(j job) smtprelay.Config {
	cfg := smtprelay.Config{
		Addr: j.addr(), Username: username, Password: password, LocalName: hello,
		Limits:   smtprelay.Limits{MaxConns: j.Conns, MaxMessagesPerConn: j.Rotate},
		Chunking: true, // no effect if the relay does not offer it
	}
	if j.dial != nil {
		cfg.Dial = func(context.Context, string, string) (net.Conn, error) { return j.dial() }
	}
	switch j.TLS {
	case tlsNone:
		cfg.TLS = smtprelay.TLSNone
	case tlsStart:
		cfg.TLS = smtprelay.TLSStartTLS
	case tlsImplicit:
		cfg.TLS = smtprelay.TLSImplicit
	}
	if !j.Resume {
		cfg.TLSConfig = &tls.Config{ClientSessionCache: forgetful{}}
	}
	return cfg
}

// forgetful is a TLS session cache that keeps no session.
type forgetful struct{}

func (forgetful) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (forgetful) Put(string, *tls.ClientSessionState)        {}

func runSmtprelay(j job, src *source, t *tally) error {
	return runSmtprelayWith(smtprelayConfig(j), j, src, t)
}

func runSmtprelayDeep(j job, src *source, t *tally) error {
	cfg := smtprelayConfig(j)
	cfg.MaxInFlight = j.InFlight
	return runSmtprelayWith(cfg, j, src, t)
}

func runSmtprelayWith(cfg smtprelay.Config, j job, src *source, t *tally) error {
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	ctx := context.Background()
	eachSender(j, src, t, func() func(int64) error {
		var message []byte
		if !j.Stream {
			message = newMessage(j.Size)
		}
		return func(n int64) error {
			var body io.WriterTo
			if j.Stream {
				body = newStream(j.Size, n)
			} else {
				stamp(message, n)
				body = smtprelay.Bytes(message)
			}
			_, err := client.Send(ctx, smtprelay.Message{From: sender, To: []string{recipient}, Body: body})
			return err
		}
	})
	return client.Shutdown(ctx)
}
