// wneessen/go-mail and gopkg.in/gomail.v2: clients that also build the message.

package main

import (
	"context"
	"io"
	"strings"
	"sync"

	"github.com/wneessen/go-mail"
	mailsmtp "github.com/wneessen/go-mail/smtp"
	"gopkg.in/gomail.v2"
)

// goMailClient is tuned with its options: no NOOP before a message.
func goMailClient(j job) (*mail.Client, error) {
	options := []mail.Option{
		mail.WithPort(j.Port), mail.WithHELO(hello), mail.WithUsername(username), mail.WithPassword(password),
		mail.WithTLSConfig(clientTLS(j)), mail.WithoutNoop(),
	}
	switch j.TLS {
	case tlsImplicit:
		options = append(options, mail.WithSSL(), mail.WithSMTPAuth(mail.SMTPAuthPlain))
	case tlsStart:
		options = append(options, mail.WithTLSPolicy(mail.TLSMandatory), mail.WithSMTPAuth(mail.SMTPAuthPlain))
	default:
		options = append(options, mail.WithTLSPolicy(mail.NoTLS), mail.WithSMTPAuth(mail.SMTPAuthPlainNoEnc))
	}
	return mail.NewClient(j.Host, options...)
}

// goMailMessages makes messages that are reused, each with another number.
func goMailMessages(j job) *sync.Pool {
	body := string(text(max(j.Size-len(header), 2)))
	return &sync.Pool{New: func() any {
		m := mail.NewMsg(mail.WithEncoding(mail.NoEncoding), mail.WithNoDefaultUserAgent())
		if err := m.From("Bench <" + sender + ">"); err != nil {
			return err
		}
		if err := m.To(recipient); err != nil {
			return err
		}
		m.Subject("a message of a certain size")
		if j.Stream {
			m.SetBodyWriter(mail.TypeTextPlain, func(w io.Writer) (int64, error) {
				s := newStream(j.Size, 0)
				s.head = nil
				return s.WriteTo(w)
			})
		} else {
			m.SetBodyString(mail.TypeTextPlain, body)
		}
		return m
	}}
}

func withGoMailMessage(messages *sync.Pool, n int64, send func(*mail.Msg) error) error {
	m, ok := messages.Get().(*mail.Msg)
	if !ok {
		return io.ErrUnexpectedEOF
	}
	defer messages.Put(m)
	m.SetMessageIDWithValue(messageID(n))
	return send(m)
}

func runGoMailEach(j job, src *source, t *tally) error {
	client, err := goMailClient(j)
	if err != nil {
		return err
	}
	messages := goMailMessages(j)
	return each(j, src, t, func(_ []byte, n int64) error {
		return withGoMailMessage(messages, n, func(m *mail.Msg) error { return client.DialAndSend(m) })
	})
}

func runGoMail(j job, src *source, t *tally) error {
	client, err := goMailClient(j)
	if err != nil {
		return err
	}
	messages := goMailMessages(j)
	return keep(j, src, t, keeper[*mailsmtp.Client]{
		dial: func() (*mailsmtp.Client, error) { return client.DialToSMTPClientWithContext(context.Background()) },
		send: func(c *mailsmtp.Client, _ []byte, n int64) error {
			return withGoMailMessage(messages, n, func(m *mail.Msg) error { return client.SendWithSMTPClient(c, m) })
		},
		quit: func(c *mailsmtp.Client) { client.CloseWithSMTPClient(c) },
	})
}

func gomailMessages(j job) *sync.Pool {
	body := string(text(max(j.Size-len(header), 2)))
	return &sync.Pool{New: func() any {
		m := gomail.NewMessage(gomail.SetEncoding(gomail.Unencoded))
		m.SetHeader("From", "Bench <"+sender+">")
		m.SetHeader("To", recipient)
		m.SetHeader("Subject", "a message of a certain size")
		if j.Stream {
			m.AddAlternativeWriter("text/plain", func(w io.Writer) error {
				s := newStream(j.Size, 0)
				s.head = nil
				_, err := s.WriteTo(w)
				return err
			})
		} else {
			m.SetBody("text/plain", body)
		}
		return m
	}}
}

func runGomail(j job, src *source, t *tally) error {
	// One Dialer for each connection: Dial modifies it.
	dialer := func() *gomail.Dialer {
		d := gomail.NewDialer(j.Host, j.Port, username, password)
		d.SSL = j.TLS == tlsImplicit
		d.LocalName = hello
		d.TLSConfig = clientTLS(j)
		return d
	}
	messages := gomailMessages(j)
	return keep(j, src, t, keeper[gomail.SendCloser]{
		dial: func() (gomail.SendCloser, error) { return dialer().Dial() },
		send: func(c gomail.SendCloser, _ []byte, n int64) error {
			m := messages.Get().(*gomail.Message)
			defer messages.Put(m)
			m.SetHeader("Message-ID", "<"+messageID(n)+">")
			return gomail.Send(c, m)
		},
		quit: func(c gomail.SendCloser) { c.Close() },
	})
}

// bodyText is the text of a message for clients that build one from parts.
func bodyText(j job) []byte {
	return []byte(strings.TrimSpace(string(text(max(j.Size-len(header), 2)))))
}
