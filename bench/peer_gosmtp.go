// emersion/go-smtp's client.

package main

import (
	"bytes"
	"io"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

func dialGoSMTP(j job) (*smtp.Client, error) {
	conf := clientTLS(j)
	var c *smtp.Client
	var err error
	switch j.TLS {
	case tlsImplicit:
		c, err = smtp.DialTLS(j.addr(), conf)
	case tlsStart:
		c, err = smtp.DialStartTLS(j.addr(), conf)
	default:
		c, err = smtp.Dial(j.addr())
	}
	if err != nil {
		return nil, err
	}
	return c, c.Auth(sasl.NewPlainClient("", username, password))
}

// runGoSMTPEach uses the package's SendMail, which insists on TLS; without TLS it does the same by hand.
func runGoSMTPEach(j job, src *source, t *tally) error {
	return each(j, src, t, func(message []byte, _ int64) error {
		auth := sasl.NewPlainClient("", username, password)
		body := bytes.NewReader(message)
		switch j.TLS {
		case tlsImplicit:
			return smtp.SendMailTLS(j.addr(), auth, sender, []string{recipient}, body)
		case tlsStart:
			return smtp.SendMail(j.addr(), auth, sender, []string{recipient}, body)
		}
		c, err := dialGoSMTP(j)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SendMail(sender, []string{recipient}, body); err != nil {
			return err
		}
		return c.Quit()
	})
}

func runGoSMTP(j job, src *source, t *tally) error {
	return keep(j, src, t, keeper[*smtp.Client]{
		dial: func() (*smtp.Client, error) { return dialGoSMTP(j) },
		send: func(c *smtp.Client, message []byte, n int64) error {
			var body io.Reader = bytes.NewReader(message)
			if j.Stream {
				body = newStream(j.Size, n).reader()
			}
			return c.SendMail(sender, []string{recipient}, body)
		},
		quit: func(c *smtp.Client) { c.Quit() },
	})
}
