// Package invite is a small service that sends mail. Its test shows how to test such a service, with smtptest as the relay and
// its faults in place of a real relay's failures.
package invite

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/smtprelay/smtprelay"
)

// State is the state of an invitation.
type State string

const (
	Sent    State = "sent"
	Bounced State = "bounced" // there is no such mailbox: ask for another address
	Waiting State = "waiting" // not sent: try again later
	Unclear State = "unclear" // perhaps sent: a person decides, since two invitations are worse than none
)

// Service invites people.
type Service struct {
	Mail *smtprelay.Client // shared with the rest of the program
	From string
}

// Invite mails an invitation to the address and returns its state. The error is for the log; it is nil if the invitation was
// sent.
func (s *Service) Invite(ctx context.Context, to string) (State, error) {
	text := fmt.Sprintf("From: <%s>\r\nTo: <%s>\r\nSubject: You are invited\r\nDate: %s\r\nMessage-ID: <%s@example.com>\r\n"+
		"List-Unsubscribe: <https://example.com/unsubscribe?address=%s>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n\r\nDo come.\r\n",
		s.From, to, time.Now().Format(time.RFC1123Z), rand.Text(), url.QueryEscape(to))
	_, err := s.Mail.Send(ctx, smtprelay.Message{
		From: s.From,
		To:   []string{to},
		Body: smtprelay.Bytes([]byte(text)),
	})

	var e *smtprelay.Error
	switch {
	case err == nil:
		return Sent, nil
	case smtprelay.OutcomeOf(err) != smtprelay.NotAccepted:
		return Unclear, err
	case !smtprelay.ShouldRetry(err) && errors.As(err, &e) && e.Scope == smtprelay.ScopeRecipient:
		return Bounced, err
	}
	return Waiting, err
}
