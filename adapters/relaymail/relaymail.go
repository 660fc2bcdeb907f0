// Package relaymail sends the messages of mail.v2 (gopkg.in/mail.v2, gomail continued) through pooled connections.
//
// A program that has a smtprelay.Client calls [Send]. One that makes a mail.Dialer for each message changes two lines, and its
// messages share the connections to each relay:
//
//	import "github.com/smtprelay/smtprelay/adapters/relaymail"
//
//	err := relaymail.DialAndSend(ctx, d, m) // was: d.DialAndSend(m)
//
// A *mail.SendError hides its Cause from errors.As. The errors of this package have the same text, and errors.As finds two errors
// in them: the *mail.SendError, whose Index tells the message, and the *smtprelay.Error. smtprelay.OutcomeOf, ShouldRetry and
// RetryTo work on them.
package relaymail

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	netmail "net/mail"
	"reflect"
	"strconv"
	"sync/atomic"
	"time"

	"gopkg.in/mail.v2"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtp"
)

// MessageOf returns m with its envelope: the address of its Sender or From header, and those of To, Cc and Bcc, each once. The Bcc
// header is not written. m is built here, once and in memory: that uses up the readers that m attaches, and every attempt sends the
// same octets.
func MessageOf(m *mail.Message) (smtprelay.Message, error) {
	var body bytes.Buffer
	var e envelope
	e.err = mail.Send(mail.SendFunc(func(from string, to []string, msg io.WriterTo) error {
		e.from, e.to = from, to
		_, err := msg.WriteTo(&body)
		return err
	}), m)
	e.WriterTo = smtprelay.Bytes(body.Bytes())
	msg, err := smtprelay.MessageOf(e)
	if err == nil {
		msg.Body = e.WriterTo
	}
	return msg, err
}

// envelope is what mail.v2 tells a Sender. It is a smtprelay.GoMail.
type envelope struct {
	io.WriterTo
	from string
	to   []string
	err  error
}

func (e envelope) GetSender(bool) (string, error) { return withBrackets(e.from), e.err }

func (e envelope) GetRecipients() ([]string, error) {
	to := make([]string, len(e.to))
	for i, addr := range e.to {
		to[i] = withBrackets(addr)
	}
	return to, e.err
}

// withBrackets puts back the quotes that the parser of mail.v2 takes from an address such as "ann smith"@example.org.
func withBrackets(addr string) string { return (&netmail.Address{Address: addr}).String() }

// sendError is the package's own error with what its Cause hides from errors.As: the *smtprelay.Error.
type sendError struct{ *mail.SendError }

func (e sendError) Unwrap() []error { return []error{e.SendError, e.Cause} }

// Send sends messages through client, one after the other, and stops at the first that is not sent. Each goes to all of its
// recipients or, if the relay refuses one of them, to nobody, as with mail.v2; client.Send with the result of [MessageOf] delivers
// to the others. It is safe for concurrent use, as long as no two calls have a message in common.
func Send(ctx context.Context, client *smtprelay.Client, messages ...*mail.Message) error {
	return sendEach(messages, func(m smtprelay.Message) error {
		_, err := client.Send(ctx, m)
		return err
	})
}

func sendEach(messages []*mail.Message, send func(smtprelay.Message) error) error {
	for i, m := range messages {
		msg, err := MessageOf(m)
		if err == nil {
			msg.AllOrNothing = true
			err = send(msg)
		}
		if err != nil {
			return sendError{&mail.SendError{Index: uint(i), Cause: err}}
		}
	}
	return nil
}

const maxIdle = 5 * time.Second // below all that relays are known to wait for, and short after a burst

// shared are the pools of DialAndSend.
var shared atomic.Pointer[smtprelay.Registry]

func init() { shared.Store(new(smtprelay.Registry)) }

// DialAndSend sends messages as [Send] does, through the pool for the settings of d: at most 10 connections are open at once to a relay
// with the same settings, and a connection that is idle for 5 seconds is closed. New Dialers with the same settings share a pool.
// If no connection is open and the relay cannot be reached, it fails at once, as mail.v2 does.
//
// A Dialer with an Auth, or with a TLSConfig that sets more than ServerName, InsecureSkipVerify, MinVersion and MaxVersion, cannot
// be compared with another: its messages share one connection, which is closed when the call ends. Use [Send] with a Client to
// pool those.
//
// What differs from mail.v2: Timeout bounds the dial alone, and ctx the call; RetryFailure is ignored, and a message that
// cannot have been accepted is tried again; credentials cross only a TLS connection, or one to localhost (an Auth decides for itself); they are
// sent as PLAIN or LOGIN, and CRAM-MD5 needs an Auth; where there is a Username and the relay offers no AUTH, the call
// fails; TLS 1.2 is the minimum.
func DialAndSend(ctx context.Context, d *mail.Dialer, messages ...*mail.Message) error {
	cfg := config(d)
	if d.Auth == nil && comparableTLS(d.TLSConfig) {
		pools := shared.Load()
		return sendEach(messages, func(m smtprelay.Message) error {
			m.FailFast = true
			_, err := pools.Send(ctx, cfg, m)
			return err
		})
	}
	cfg.Limits.MaxConns = 1
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	err = sendEach(messages, func(m smtprelay.Message) error {
		m.FailFast = true
		_, err := client.Send(ctx, m)
		return err
	})
	_ = client.Shutdown(ctx) // QUIT, whose failure changes nothing
	return err
}

// Shutdown closes the connections of all pools of [DialAndSend] with QUIT when the calls that use them are done. If ctx ends first,
// it closes the rest at once and returns the context's error. A later DialAndSend opens new pools.
func Shutdown(ctx context.Context) error { return shared.Swap(new(smtprelay.Registry)).Shutdown(ctx) }

// config has the settings of d.
func config(d *mail.Dialer) smtprelay.Config {
	cfg := smtprelay.Config{
		Name:      "mail.v2",
		Addr:      net.JoinHostPort(d.Host, strconv.Itoa(d.Port)),
		TLS:       smtprelay.TLSOpportunistic,
		TLSConfig: d.TLSConfig,
		LocalName: d.LocalName,
		Limits:    smtprelay.Limits{MaxIdleTime: maxIdle},
	}
	switch {
	case d.SSL:
		cfg.TLS = smtprelay.TLSImplicit
	case d.StartTLSPolicy == mail.MandatoryStartTLS:
		cfg.TLS = smtprelay.TLSStartTLS
	case d.StartTLSPolicy == mail.NoStartTLS:
		cfg.TLS = smtprelay.TLSNone
	}
	if d.Timeout > 0 {
		cfg.Timeouts.Dial = d.Timeout
	}
	switch {
	case d.Auth != nil:
		auth := d.Auth
		cfg.Auth = smtp.SASL(func(smtprelay.ServerInfo) (smtp.Auth, error) { return auth, nil })
		cfg.AllowInsecureAuth = true // the Auth decides
	case d.Username != "":
		cfg.Username, cfg.Password = d.Username, d.Password
	}
	return cfg
}

// comparableTLS reports whether t sets nothing but what a Registry compares.
func comparableTLS(t *tls.Config) bool {
	if t == nil {
		return true
	}
	rest := t.Clone()
	rest.ServerName, rest.InsecureSkipVerify, rest.MinVersion, rest.MaxVersion = "", false, 0, 0
	return reflect.ValueOf(rest).Elem().IsZero()
}
