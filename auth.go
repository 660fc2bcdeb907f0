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

// mechanism returns the SASL mechanism for a relay that offers ext; nil means no authentication.
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
	case slices.Contains(ext.Auth, sasl.Plain) && !c.noPlain.Load():
		return sasl.NewPlainClient("", c.Username, c.password.reveal()), nil
	case slices.Contains(ext.Auth, sasl.Login):
		return &loginClient{username: c.Username, password: c.password}, nil
	}
	err := &conn.OpenError{Step: conn.StepAuth, Permanent: true}
	if len(ext.Auth) == 0 && state == nil && ext.Has("STARTTLS") {
		err.Err = errors.New("the relay does not offer AUTH in the clear, but it offers STARTTLS: use TLSStartTLS, or smtp:// in a URL")
	} else if len(ext.Auth) == 0 {
		err.Err = fmt.Errorf("the relay does not offer AUTH (it offers %s); is this the port for submission?", c.offered(ext.Keywords))
	} else {
		err.Err = fmt.Errorf("no mechanism in common: the relay offers %s, and a password can be given by PLAIN or LOGIN; set Config.Auth for another", c.offered(ext.Auth))
	}
	return nil, err
}

// otherMechanism returns the mechanism to try on the same connection if the relay offers PLAIN but has refused it as a
// mechanism; nil if there is none. PLAIN is not tried again.
func (c *settings) otherMechanism(refused string, ext *wire.Extensions) sasl.Client {
	if refused != sasl.Plain || !slices.Contains(ext.Auth, sasl.Login) {
		return nil
	}
	c.noPlain.Store(true)
	return &loginClient{username: c.Username, password: c.password}
}

// offered quotes words from the relay's EHLO reply.
func (c *settings) offered(words []string) string {
	if len(words) == 0 {
		return "nothing"
	}
	return printable.Quote(c.said.Scrub(strings.Join(words, " ")), printable.MostWords)
}

// loginClient is the LOGIN mechanism, which has no standard. The first challenge asks for the user name and the second for the
// password, whatever their text. If the first challenge clearly asks for the password, loginClient sends the password.
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

// refusedAuth returns the error for r, the relay's refusal of AUTH.
func (c *settings) refusedAuth(r wire.Reply) *Error {
	e := &Error{Op: OpAuth, Reply: publicReply(r), Outcome: NotAccepted, Scope: ScopeRelay}
	c.explainAuth(e)
	return e
}

// explainAuth adds advice to e if it is the relay's refusal of AUTH. The code says why AUTH was refused (RFC 4954, 4 and 6).
func (c *settings) explainAuth(e *Error) {
	if e.Op != OpAuth || e.Err != nil || e.Reply.says(tooManyConns, OpAuth) {
		return
	}
	if advice := c.authAdvice(e.Reply); advice != "" {
		e.Err = errors.New(advice)
	}
}

func (c *settings) authAdvice(r Reply) string {
	own := c.Auth != nil
	switch r.Code {
	case 454:
		return "this is temporary: the relay cannot check credentials now"
	case 502, 504:
		if own {
			return "the relay does not accept this mechanism; let Config.Auth choose another"
		}
		return "the relay does not accept this mechanism; set Config.Auth for another"
	case 503:
		return "the relay says that AUTH is out of order; the credentials may be right"
	case 530, 538:
		return "the relay wants TLS before AUTH; use TLSStartTLS, or TLSImplicit on port 465"
	case 534:
		return "the relay wants a stronger mechanism than a password: an app password of the account, or OAuth by Config.Auth"
	case 535:
		switch {
		case own:
			return "check what Config.Auth returns"
		case isSendGrid(c.host):
			return "check Username and Password: they are the word apikey, and an API key that may send mail"
		}
		return "check Username and Password"
	}
	return ""
}

// isSendGrid reports whether host belongs to SendGrid.
func isSendGrid(host string) bool {
	host = strings.ToLower(host)
	return host == "sendgrid.net" || strings.HasSuffix(host, ".sendgrid.net")
}

var (
	wantsTLS  = words("starttls|\\btls\\b|\\bssl\\b|encrypt")
	wantsAuth = words("authent|relay(ing)? (access )?(is )?(not|denied)|not permitted to relay|\\blog ?in\\b")
)

// explainRefusal adds advice to e if the relay refused a sender or recipient because the client did not authenticate, or did not
// use TLS.
func (c *settings) explainRefusal(e *Error, ext *wire.Extensions, clear bool) {
	if e == nil || e.Err != nil || e.Reply.Code/100 != 5 || e.Op != OpMail && e.Op != OpRcpt {
		return
	}
	text := e.Reply.Message
	required := e.Reply.Code == 530
	switch {
	case required && clear && (wantsTLS.MatchString(text) || !ext.Has("AUTH")):
		e.Err = errors.New("the relay wants TLS; use TLSStartTLS, or TLSImplicit on port 465")
	case c.authenticates() || !ext.Has("AUTH"):
	case required, e.Op == OpRcpt && e.Reply.Code == 554, wantsAuth.MatchString(text):
		e.Err = errors.New("no credentials were given, and the relay offers AUTH; set Username and Password")
	}
}
