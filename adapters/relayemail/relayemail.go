// Package relayemail sends the messages of github.com/jordan-wright/email through a smtprelay.Client.
//
//	import "github.com/smtprelay/smtprelay/adapters/relayemail"
//
//	err := relayemail.Send(ctx, client, e) // was: e.Send(addr, auth), or pool.Send(e, timeout)
package relayemail

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"

	"github.com/jordan-wright/email"

	"github.com/smtprelay/smtprelay"
)

// MessageOf builds e and returns it with its envelope: the address of Sender or From, and those of To, Cc and Bcc, each once. The
// header has no Bcc field. e is built once, so that another attempt has the same Message-Id.
func MessageOf(e *email.Email) (smtprelay.Message, error) {
	raw, err := e.Bytes()
	body := smtprelay.Bytes(raw)
	m, err := smtprelay.MessageOf(envelope{body, e, err})
	if err == nil {
		m.Body = body
	}
	return m, err
}

// Send sends e through client: to all of its recipients or, if the relay refuses one of them, to nobody, as with e.Send;
// client.Send with the result of [MessageOf] delivers to the others. Its error is an *smtprelay.Error.
func Send(ctx context.Context, client *smtprelay.Client, e *email.Email) error {
	m, err := MessageOf(e)
	if err != nil {
		return err
	}
	m.AllOrNothing = true
	_, err = client.Send(ctx, m)
	return err
}

var errNoFrom = errors.New("the message has neither a Sender nor a From")

// envelope is a smtprelay.GoMail.
type envelope struct {
	io.WriterTo
	email *email.Email
	err   error // of building it
}

func (e envelope) GetSender(bool) (string, error) {
	if e.err != nil {
		return "", e.err
	}
	from, err := smtprelay.ParseAddresses(cmp.Or(e.email.Sender, e.email.From))
	if err != nil || len(from) == 0 {
		return "", cmp.Or(err, errNoFrom)
	}
	return from[0], nil
}

func (e envelope) GetRecipients() ([]string, error) {
	return smtprelay.ParseAddresses(slices.Concat(e.email.To, e.email.Cc, e.email.Bcc)...)
}
