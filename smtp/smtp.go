// Package smtp has the names of net/smtp over a shared pool of connections: a program that calls [SendMail] for each message
// changes one import line, from "net/smtp" to "github.com/smtprelay/smtprelay/smtp", and nothing else.
//
// It is as opportunistic as net/smtp: STARTTLS is used where the relay offers it, and a handshake that fails or a certificate that
// does not verify is an error; where it is not offered, or an attacker on the way hides it, the mail crosses the network in
// the clear. Credentials follow the rule of the Auth that is given: [PlainAuth] sends them over TLS or to localhost only,
// [CRAMMD5Auth] and others decide for themselves. A program that can be changed further uses [smtprelay.Client], which requires TLS,
// takes a context and reports the outcome for each recipient.
//
// SendMail keeps the connections to an address, for the same credentials, in one pool: at most 10 are open at once, each for at
// most 100 messages, and a connection that is idle for 5 seconds is closed. The key of a pool is the address and the content of the
// Auth (a hash of its type, and of its strings, numbers and other plain values), not its pointer: a new PlainAuth for each call
// finds the same pool. Each connection authenticates with a copy of the Auth, so that the state of an Auth is not shared. An Auth
// that holds a func, an interface, a map, a channel or a lock cannot be compared: it is used as it is, for one connection that
// serves one call, as with net/smtp. 64 pools are kept; above that the least recently used one is closed. Nothing is kept of the
// credentials but that copy.
//
// What differs from net/smtp:
//
//	connections         shared by all calls; at most 10 to a relay for the same credentials, the other calls wait
//	one AUTH            for a connection, not for each message; credentials that were refused are not tried again for a while
//	time limits         those of RFC 5321, 4.5.3.2; net/smtp has none
//	EHLO                says "localhost" to a relay on this machine only, to others the name or address of this host
//	port 465            TLS from the first byte, which net/smtp cannot do
//	PIPELINING          is used: one or two round trips for a message, not four
//	a refused recipient nobody gets the message, as before
//	a refusal           is a *textproto.Error by type assertion, as before; any other failure is a *smtprelay.Error
//	a lost connection   before the final dot: an error, and the message is not tried again; after it: an error whose Outcome is
//	                    Unknown, in which no *textproto.Error is found
//	QUIT                is no error if it fails after the message was accepted
//	addresses           are checked: no brackets, no control characters; to must not be empty, nor msg
//	msg                 a bare CR becomes CRLF, as a bare LF does
//	SMTPUTF8            is asked for where an address is not ASCII, not always
//	Auth.Next           is not called with more == false, after the relay has accepted the credentials
//	Auth.Start          must choose one of the mechanisms that the relay offers
//	HELO                where EHLO is not understood and there is an Auth, the call fails; net/smtp went on without authentication
//	Client, Dial        are net/smtp's own: what is sent through them uses no pool
//
// The pools live until the process ends or [Shutdown] closes them.
package smtp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	netsmtp "net/smtp"
	"net/textproto"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/fingerprint"
	"github.com/smtprelay/smtprelay/internal/printable"
)

// Auth is net/smtp's.
type Auth = netsmtp.Auth

// ServerInfo is net/smtp's.
type ServerInfo = netsmtp.ServerInfo

// Client is net/smtp's: one connection, which its caller keeps and no pool uses.
type Client = netsmtp.Client

// PlainAuth is net/smtp's: it sends the credentials only over TLS or to localhost, and only to host.
func PlainAuth(identity, username, password, host string) Auth {
	return netsmtp.PlainAuth(identity, username, password, host)
}

// CRAMMD5Auth is net/smtp's.
func CRAMMD5Auth(username, secret string) Auth { return netsmtp.CRAMMD5Auth(username, secret) }

// Dial is net/smtp's.
func Dial(addr string) (*Client, error) { return netsmtp.Dial(addr) }

// NewClient is net/smtp's.
func NewClient(conn net.Conn, host string) (*Client, error) { return netsmtp.NewClient(conn, host) }

const (
	maxPools = 64
	maxIdle  = 5 * time.Second // below all that relays are known to wait for, and short after a burst
)

// shared are the pools.
var shared atomic.Pointer[smtprelay.Registry]

func init() { shared.Store(newPools()) }

func newPools() *smtprelay.Registry { return &smtprelay.Registry{Max: maxPools} }

// SendMail sends msg from from to all of to, or to nobody, through the relay at addr, a "host:port" whose port may be a name such
// as "smtp". a may be nil for no authentication. It is safe for concurrent use; the package comment lists the differences from
// net/smtp.
//
// If the relay has refused the message or the connection, the error is a *textproto.Error. Any other error is a *smtprelay.Error.
// smtprelay.OutcomeOf and errors.As find the outcome in both.
func SendMail(addr string, a Auth, from string, to []string, msg []byte) error {
	cfg := smtprelay.Config{
		TLS: smtprelay.TLSOpportunistic, AllowInsecureAuth: true, // a decides
		Limits: smtprelay.Limits{MaxIdleTime: maxIdle},
		Retry:  smtprelay.Retry{MaxAttempts: 1},
	}
	cfg.Addr, cfg.LocalName = place(addr)
	if from == "" {
		from = smtprelay.NullSender
	}
	m := smtprelay.Message{From: from, To: to, Body: smtprelay.Bytes(msg), AllOrNothing: true}
	if a != nil {
		sum, whole := fingerprint.Of(a)
		if !whole {
			cfg.Auth = SASL(func(smtprelay.ServerInfo) (Auth, error) { return a, nil })
			return sendAlone(cfg, m)
		}
		kept := fingerprint.Copy(a)
		cfg.Name = fmt.Sprintf("%x", sum)
		cfg.Auth = SASL(func(smtprelay.ServerInfo) (Auth, error) { return fingerprint.Copy(kept), nil })
	}
	_, err := shared.Load().Send(context.Background(), cfg, m)
	return asBefore(err)
}

// Shutdown closes the connections of all pools with QUIT, when the calls of SendMail that use them are done. If ctx ends first, it
// closes the rest at once and returns the context's error. Calls that still wait for a connection fail with smtprelay.ErrClosed. A
// later SendMail opens new pools.
func Shutdown(ctx context.Context) error { return shared.Swap(newPools()).Shutdown(ctx) }

// sendAlone sends m over a connection of its own.
func sendAlone(cfg smtprelay.Config, m smtprelay.Message) error {
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	_, err = client.Send(context.Background(), m)
	_ = client.Shutdown(context.Background()) // QUIT, whose failure changes nothing; Timeouts.Quit bounds it
	return asBefore(err)
}

// place returns addr with a number for its port, and the argument of EHLO, "" for the usual one.
func place(addr string) (hostPort, localName string) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return cmp.Or(addr, ":"), "" // for New to say what is wrong with it; nothing at all would be SendGrid
	}
	host = cmp.Or(host, "localhost") // as net.Dial has it
	if n, err := net.LookupPort("tcp", port); err == nil {
		port = strconv.Itoa(n)
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.Unmap().IsLoopback() || strings.EqualFold(host, "localhost") {
		localName = "localhost"
	}
	return net.JoinHostPort(host, port), localName
}

// asBefore is err as the callers of net/smtp know it: a refusal is a *textproto.Error, and what may have been accepted is not,
// whatever the relay has said.
func asBefore(err error) error {
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok || e.Reply.Code == 0 {
		return err
	}
	if e.Outcome == smtprelay.NotAccepted && e.Reply.Code >= 400 {
		words := e.Reply.Message
		if code := e.Reply.EnhancedCode.String(); code != "" { // net/smtp does not take it off
			words = code + " " + words
		}
		return &textproto.Error{Code: e.Reply.Code, Msg: printable.Line(words)}
	}
	hidden := *e
	hidden.Err, hidden.Reply = fmt.Errorf("the relay has said %s", e.Reply), smtprelay.Reply{}
	return &hidden
}

// SASL makes a Config.Auth from net/smtp's Auths: it calls newAuth for each connection, since many Auths keep state. newAuth may
// return nil to go on without authentication. An empty initial response means none, as in net/smtp.
//
//	cfg.Auth = smtp.SASL(func(smtprelay.ServerInfo) (smtp.Auth, error) { return LoginAuth(username, password), nil })
func SASL(newAuth func(smtprelay.ServerInfo) (Auth, error)) func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
	return func(_ context.Context, s smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
		a, err := newAuth(s)
		switch {
		case err != nil:
			return nil, err
		case a == nil:
			return nil, nil
		case len(s.Mechanisms) == 0:
			return nil, errors.New("smtp: server doesn't support AUTH") // net/smtp's words
		}
		return &mechanism{a, &ServerInfo{Name: s.Name, TLS: s.TLS != nil, Auth: s.Mechanisms}}, nil
	}
}

// mechanism is an Auth for one authentication.
type mechanism struct {
	auth   Auth
	server *ServerInfo
}

// Start implements smtprelay.Mechanism.
func (m *mechanism) Start() (mech string, ir []byte, err error) {
	mech, ir, err = m.auth.Start(m.server)
	if len(ir) == 0 {
		ir = nil
	}
	return mech, ir, err
}

// Next implements smtprelay.Mechanism.
func (m *mechanism) Next(challenge []byte) ([]byte, error) { return m.auth.Next(challenge, true) }
