// Package relayenmime sends the messages of enmime (github.com/jhillyerd/enmime/v2) through a smtprelay.Client.
//
//	import "github.com/smtprelay/smtprelay/adapters/relayenmime"
//
//	err := relayenmime.Send(ctx, client, builder) // was: builder.Send(enmime.NewSMTP(addr, auth))
package relayenmime

import (
	"context"

	"github.com/jhillyerd/enmime/v2"

	"github.com/smtprelay/smtprelay"
)

// MessageOf builds the message and returns it with its envelope: the address of From, and those of To, CC and BCC, each once.
// enmime writes no BCC header, and no Message-ID unless you set one.
func MessageOf(b enmime.MailBuilder) (smtprelay.Message, error) {
	e := &envelope{}
	e.err = b.Send(e)
	m, err := smtprelay.MessageOf(e)
	if err == nil {
		m.Body = e.body
	}
	return m, err
}

// Send sends the message of b through client: to all of its recipients or, if the relay refuses one of them, to nobody, as
// with enmime; client.Send with the result of [MessageOf] delivers to the others. Its error is an *smtprelay.Error.
func Send(ctx context.Context, client *smtprelay.Client, b enmime.MailBuilder) error {
	m, err := MessageOf(b)
	if err != nil {
		return err
	}
	m.AllOrNothing = true
	_, err = client.Send(ctx, m)
	return err
}

// Sender is an enmime.Sender, for a program that makes one at its start: Sender{client} takes the place of
// enmime.NewSMTP(addr, auth). It is safe for concurrent use. The Timeouts of the Client bound each message, since no context does.
type Sender struct{ Client *smtprelay.Client }

var _ enmime.Sender = Sender{}

// Send implements enmime.Sender, by [smtprelay.Client.SendMail].
func (s Sender) Send(reversePath string, recipients []string, msg []byte) error {
	return s.Client.SendMail(reversePath, recipients, msg)
}
