// net/smtp, the standard library's.

package main

import (
	"crypto/tls"
	"net/smtp"
)

func netSMTPAuth(j job) smtp.Auth { return smtp.PlainAuth("", username, password, j.Host) }

// runSendMail is what most programs do. SendMail does not support implicit TLS.
func runSendMail(j job, src *source, t *tally) error {
	auth := netSMTPAuth(j)
	return each(j, src, t, func(message []byte, _ int64) error {
		return smtp.SendMail(j.addr(), auth, sender, []string{recipient}, message)
	})
}

func runNetSMTP(j job, src *source, t *tally) error {
	conf := clientTLS(j)
	auth := netSMTPAuth(j)
	return keep(j, src, t, keeper[*smtp.Client]{
		dial: func() (*smtp.Client, error) {
			conn, err := j.connect()
			if err != nil {
				return nil, err
			}
			if j.TLS == tlsImplicit {
				conn = tls.Client(conn, conf)
			}
			c, err := smtp.NewClient(conn, j.Host)
			if err != nil {
				return nil, err
			}
			if err := c.Hello(hello); err != nil {
				return nil, err
			}
			if j.TLS == tlsStart {
				if err := c.StartTLS(conf); err != nil {
					return nil, err
				}
			}
			return c, c.Auth(auth)
		},
		send: func(c *smtp.Client, message []byte, n int64) error {
			if err := c.Mail(sender); err != nil {
				return err
			}
			if err := c.Rcpt(recipient); err != nil {
				return err
			}
			w, err := c.Data()
			if err != nil {
				return err
			}
			if j.Stream {
				_, err = newStream(j.Size, n).WriteTo(w)
			} else {
				_, err = w.Write(message)
			}
			if err != nil {
				return err
			}
			return w.Close()
		},
		quit: func(c *smtp.Client) { c.Quit() },
	})
}
