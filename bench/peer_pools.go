// The pools for Go: knadh/smtppool, jordan-wright/email.

package main

import (
	"errors"
	"io"
	"net/textproto"
	"time"

	"github.com/jordan-wright/email"
	"github.com/knadh/smtppool/v2"
)

// Neither pool can rotate: its connections reach the relay's limit, and for each the caller gets one 421.

// resend calls send again, up to five times in all, after an error that says that the relay is closing the connection. It is safe
// only because this relay never hangs up between a final dot and its reply.
func resend(send func() error) error {
	var err error
	for range 5 {
		if err = send(); !goneAway(err) {
			break
		}
	}
	return err
}

func runSMTPPool(j job, src *source, t *tally) error {
	opt := smtppool.Opt{
		Host: j.Host, Port: j.Port, HelloHostname: hello,
		MaxConns: min(j.Conns, j.Senders), MaxMessageRetries: 2, PoolWaitTimeout: time.Minute,
		Auth: netSMTPAuth(j), TLSConfig: clientTLS(j),
	}
	switch j.TLS {
	case tlsImplicit:
		opt.SSL = smtppool.SSLTLS
	case tlsStart:
		opt.SSL = smtppool.SSLSTARTTLS
	}
	pool, err := smtppool.New(opt)
	if err != nil {
		return err
	}
	body := bodyText(j)
	eachSender(j, src, t, func() func(int64) error {
		return func(n int64) error {
			return resend(func() error {
				return pool.Send(smtppool.Email{
					From: "Bench <" + sender + ">", To: []string{recipient}, Subject: "a message of a certain size", Text: body,
					Headers: textproto.MIMEHeader{"Message-Id": {"<" + messageID(n) + ">"}},
				})
			})
		}
	})
	pool.Close()
	return nil
}

func runEmailPool(j job, src *source, t *tally) error {
	pool, err := email.NewPool(j.addr(), min(j.Conns, j.Senders), netSMTPAuth(j), clientTLS(j))
	if err != nil {
		return err
	}
	pool.SetHelloHostname(hello)
	body := bodyText(j)
	eachSender(j, src, t, func() func(int64) error {
		return func(n int64) error {
			m := email.NewEmail()
			m.From, m.To, m.Subject, m.Text = "Bench <"+sender+">", []string{recipient}, "a message of a certain size", body
			m.Headers.Set("Message-Id", "<"+messageID(n)+">")
			return resend(func() error { return pool.Send(m, time.Minute) })
		}
	})
	pool.Close()
	return nil
}

// goneAway reports whether err says that the relay is closing, or has closed, the connection.
func goneAway(err error) bool {
	reply, ok := errors.AsType[*textproto.Error](err)
	return ok && reply.Code == 421 || errors.Is(err, io.EOF)
}
