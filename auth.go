package smtprelay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// mechanism chooses how to authenticate with a relay that offers ext; nil means not at all.
func (c *settings) mechanism(ctx context.Context, ext *wire.Extensions, state *tls.ConnectionState) (sasl.Client, error) {
	if c.Auth != nil {
		c.opening.Store(OpAuth)
		mech, err := c.Auth(ctx, ServerInfo{Name: c.host, Mechanisms: slices.Clone(ext.Auth), TLS: state})
		if err != nil {
			return nil, fmt.Errorf("Config.Auth: %w", err)
		}
		return mech, nil
	}
	switch {
	case slices.Contains(ext.Auth, sasl.Plain):
		return sasl.NewPlainClient("", c.Username, c.password.reveal()), nil
	case slices.Contains(ext.Auth, sasl.Login):
		return &loginClient{username: c.Username, password: c.password}, nil
	}
	err := &conn.OpenError{Step: conn.StepAuth, Permanent: true}
	if len(ext.Auth) == 0 {
		err.Err = fmt.Errorf("the relay does not offer AUTH (it offers %s); is this the port for submission?", c.offered(ext.Keywords))
	} else {
		err.Err = fmt.Errorf("no mechanism in common: the relay offers %s, and a password can be given by PLAIN or LOGIN; set Config.Auth for another", c.offered(ext.Auth))
	}
	return nil, err
}

// offered quotes words of the relay's.
func (c *settings) offered(words []string) string {
	if len(words) == 0 {
		return "nothing"
	}
	return printable.Quote(c.said.Scrub(strings.Join(words, " ")), printable.MostWords)
}

// loginClient is the LOGIN mechanism, which has no standard: the first challenge asks for the user name and the second
// for the password, in whatever words. Only where the first one clearly asks for the password is it given at once.
type loginClient struct {
	username string
	password secret
	asked    int
}

// Start implements Mechanism.
func (l *loginClient) Start() (mech string, ir []byte, err error) { return sasl.Login, nil, nil }

// Next implements Mechanism.
func (l *loginClient) Next(challenge []byte) ([]byte, error) {
	l.asked++
	switch {
	case l.asked == 1 && !conn.AsksPassword(challenge):
		return []byte(l.username), nil
	case l.asked <= 2:
		return []byte(l.password.reveal()), nil
	}
	return nil, sasl.ErrUnexpectedServerChallenge
}

// refusedAuth is the error of the relay's refusal of AUTH.
func (c *settings) refusedAuth(r wire.Reply) *Error {
	e := &Error{Op: OpAuth, Reply: publicReply(r), Outcome: NotAccepted, Scope: ScopeRelay}
	c.explainAuth(e)
	return e
}

// explainAuth says what to do where e is the relay's refusal of credentials for good.
func (c *settings) explainAuth(e *Error) {
	if e.Op != OpAuth || e.Reply.Code/100 != 5 || e.Reply.says(tooManyConns, OpAuth) {
		return
	}
	e.Err = errors.New("check Username and Password (SendGrid's are the word apikey and an API key that may send mail)")
	if c.Auth != nil {
		e.Err = errors.New("check what Config.Auth returns")
	}
}
