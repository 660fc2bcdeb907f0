// What may be sent without TLS: mail depending on the TLS mode, credentials by a separate rule.
package test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// placed is a connection with a given remote address.
type placed struct {
	net.Conn
	remote net.Addr
}

func (p placed) RemoteAddr() net.Addr { return p.remote }

var elsewhere = &net.TCPAddr{IP: net.IPv4(203, 0, 113, 5), Port: 587}

func TestCredentialsAreSentInPlaintextOnlyOnThisMachineOrIfAllowed(t *testing.T) {
	const password = "the-real-key-0123456789"
	byPassword := func(c *smtprelay.Config) {}
	byAuth := func(c *smtprelay.Config) {
		c.Username, c.Password = "", ""
		c.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewPlainClient("", "ann", password), nil
		}
	}
	for _, tt := range []struct {
		why    string
		addr   string
		remote net.Addr // nil: the connection's own
		mode   smtprelay.TLSMode
		word   bool
		set    func(*smtprelay.Config)
		passes bool
	}{
		{"no TLS, to another machine", "relay.example:587", elsewhere, smtprelay.TLSNone, false, byPassword, false},
		{"opportunistic, to another machine", "relay.example:587", elsewhere, smtprelay.TLSOpportunistic, false, byPassword, false},
		{"a custom mechanism", "relay.example:587", elsewhere, smtprelay.TLSNone, false, byAuth, false},
		{"the same, opportunistic", "relay.example:587", elsewhere, smtprelay.TLSOpportunistic, false, byAuth, false},
		{"a name of this machine that resolves to another", "localhost:587", elsewhere, smtprelay.TLSNone, false, byPassword, false},
		{"the same, opportunistic", "localhost:587", elsewhere, smtprelay.TLSOpportunistic, false, byPassword, false},
		{"the same with an IPv6 address", "[::1]:587", &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 587}, smtprelay.TLSNone, false, byAuth, false},
		{"another machine through a proxy on this one", "relay.example:587", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1080}, smtprelay.TLSNone, false, byPassword, false},
		{"another machine over a connection without an address", "relay.example:587", &net.UnixAddr{Name: "@", Net: "unix"}, smtprelay.TLSNone, false, byPassword, false},
		{"no TLS, allowed", "relay.example:587", elsewhere, smtprelay.TLSNone, true, byPassword, true},
		{"opportunistic, allowed", "relay.example:587", elsewhere, smtprelay.TLSOpportunistic, true, byAuth, true},
		{"this machine", "127.0.0.1:587", nil, smtprelay.TLSNone, false, byPassword, true},
		{"this machine, opportunistic", "localhost:587", nil, smtprelay.TLSOpportunistic, false, byPassword, true},
		{"this machine, by its port", "localhost:587", nil, smtprelay.TLSByPort, false, byAuth, true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.NoTLS, s.Username, s.Password = true, "ann", password })
			record := &recorder{dial: relay.Dial}
			cfg := smtprelay.Config{Addr: tt.addr, Username: "ann", Password: password, TLS: tt.mode, AllowInsecureAuth: tt.word,
				Retry: smtprelay.Retry{MaxAttempts: 1}}
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				nc, err := record.Dial(ctx, network, addr)
				if err == nil && tt.remote != nil {
					nc = placed{nc, tt.remote}
				}
				return nc, err
			}
			tt.set(&cfg)
			_, err := newClient(t, cfg).Send(t.Context(), numbered(1))
			if tt.passes {
				if err != nil || len(relay.Messages()) != 1 {
					t.Errorf("got %v and %d messages, want it sent", err, len(relay.Messages()))
				}
				return
			}
			e, ok := errors.AsType[*smtprelay.Error](err)
			if !ok || e.Op != smtprelay.OpAuth || e.Outcome != smtprelay.NotAccepted || !strings.Contains(err.Error(), "AllowInsecureAuth") {
				t.Errorf("got %v, want an error of AUTH that names AllowInsecureAuth", err)
			}
			if got := record.written(); strings.Contains(got, "AUTH") || strings.Contains(got, "MAIL") {
				t.Errorf("the client wrote %q, want neither AUTH nor MAIL", got)
			}
		})
	}
}

func TestOpportunisticTLSIsUsedIfOfferedAndNeverAbandoned(t *testing.T) {
	for _, tt := range []struct {
		why   string
		relay func(*smtptest.Server)
		roots bool
		op    smtprelay.Op // of the error; "" means that the mail is sent
		tls   bool
	}{
		{"it is offered", func(*smtptest.Server) {}, true, "", true},
		{"it is not offered", func(s *smtptest.Server) { s.NoTLS = true }, true, "", false},
		{"the certificate's authority is unknown", func(*smtptest.Server) {}, false, smtprelay.OpTLS, false},
		{"the certificate is for another name", func(s *smtptest.Server) { s.CertNames = []string{"other.example"} }, true, smtprelay.OpTLS, false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			relay := newRelay(t, tt.relay, func(s *smtptest.Server) { s.NoAuth = true })
			record := &recorder{dial: relay.Dial}
			cfg := relay.Config()
			cfg.TLS, cfg.Dial, cfg.Retry.MaxAttempts = smtprelay.TLSOpportunistic, record.Dial, 1
			if !tt.roots {
				cfg.TLSConfig = nil
			}
			_, err := newClient(t, cfg).Send(t.Context(), numbered(1))
			if e, _ := errors.AsType[*smtprelay.Error](err); (e == nil) != (tt.op == "") || e != nil && e.Op != tt.op {
				t.Errorf("got %v, want op %q", err, tt.op)
			}
			if inClear := strings.Contains(record.written(), "MAIL FROM"); inClear != (tt.op == "" && !tt.tls) {
				t.Errorf("mail in plaintext: got %v", inClear)
			}
		})
	}
	t.Run("STARTTLS is refused", func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.NoAuth = true })
		relay.Fault(smtptest.Fault{At: smtptest.StartTLS, Reply: "454 4.7.0 not now"})
		cfg := relay.Config()
		cfg.TLS, cfg.Retry.MaxAttempts = smtprelay.TLSOpportunistic, 1
		_, err := newClient(t, cfg).Send(t.Context(), numbered(1))
		if e, _ := errors.AsType[*smtprelay.Error](err); e == nil || e.Op != smtprelay.OpSTARTTLS || len(relay.Messages()) != 0 {
			t.Errorf("got %v, want the refusal of STARTTLS and no mail", err)
		}
	})
}

// If a relay seems to offer no STARTTLS, an attacker on the path may be hiding it.
func TestMissingTLSForCredentialsIsTemporary(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) { s.NoTLS = true })
	cfg := relay.Config()
	cfg.Addr, cfg.TLS, cfg.Dial, cfg.Retry.MaxAttempts = "relay.example:587", smtprelay.TLSOpportunistic, relay.Dial, 1
	_, err := newClient(t, cfg).Send(t.Context(), numbered(1))
	if e, _ := errors.AsType[*smtprelay.Error](err); e == nil || !e.Temporary() || !strings.Contains(err.Error(), "hides it") {
		t.Errorf("got %v, want a temporary error that says so", err)
	}
}
