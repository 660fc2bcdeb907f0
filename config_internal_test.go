package smtprelay

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/smtprelay/smtprelay/internal/fingerprint"
)

func TestNewReportsEachMistake(t *testing.T) {
	const key = "SG.s3cret-k3y"
	mechanism := func(context.Context, ServerInfo) (Mechanism, error) { return nil, nil }
	for _, tt := range []struct {
		why  string
		edit func(*Config)
		says []string // in the error; none means that the configuration is valid
	}{
		{"a key is all that SendGrid needs", func(c *Config) { *c = Config{Password: key} }, nil},
		{"another relay may need no credentials", func(c *Config) { *c = Config{Addr: "relay.example:25"} }, nil},
		{"an IPv6 address", func(c *Config) { c.Addr = "[2001:db8::1]:587" }, nil},
		{"a key without a user name, for another relay", func(c *Config) { c.Username = "" }, []string{"Username is empty"}},
		{"SendGrid's host in any case", func(c *Config) { *c = Config{Addr: "SMTP.SendGrid.net:465", Password: key} }, nil},
		{"the path of a socket", func(c *Config) { c.Addr = "/run/relay.sock" }, []string{"Config.Dial"}},
		{"the URL of a socket", func(c *Config) { c.Addr = "unix:///run/relay.sock" }, []string{"Config.Dial"}},
		{"a pipe", func(c *Config) { c.Addr = `\\.\pipe\relay` }, []string{"Config.Dial"}},
		{"no key for SendGrid", func(c *Config) { *c = Config{} }, []string{"Password is empty", "SendGrid"}},
		{"no key for its host in the EU", func(c *Config) { *c = Config{Addr: "smtp.eu.sendgrid.net:587"} }, []string{"Password is empty", "SendGrid"}},
		{"Auth instead of a key", func(c *Config) { *c = Config{Auth: mechanism} }, nil},

		{"no port", func(c *Config) { c.Addr = "relay.example" }, []string{`"relay.example" has no port`, `"relay.example:587"`}},
		{"no host", func(c *Config) { c.Addr = ":587" }, []string{`":587" has no host`}},
		{"an IPv6 address without brackets", func(c *Config) { c.Addr = "2001:db8::1" }, []string{"not host:port", "too many colons"}},
		{"a space before the host", func(c *Config) { c.Addr = " relay.example:587" }, []string{`" relay.example:587"`, "white space"}},
		{"a line end in the host", func(c *Config) { c.Addr = "relay\n.example:587" }, []string{"white space or control"}},
		{"a bracket that is not closed", func(c *Config) { c.Addr = "[::1:25" }, []string{"not host:port", "missing ']'"}},
		{"an IPv6 address with a zone", func(c *Config) { c.Addr = "[fe80::1%eth0]:587" }, nil},
		{"brackets around something else", func(c *Config) { c.Addr = "[relay:example]:587" }, []string{"IPv6"}},
		{"a port by name", func(c *Config) { c.Addr = "relay.example:submission" }, []string{"1 to 65535"}},
		{"port 0", func(c *Config) { c.Addr = "relay.example:0" }, []string{"1 to 65535"}},
		{"a port of more than 16 bits", func(c *Config) { c.Addr = "relay.example:65536" }, []string{"1 to 65535"}},
		{"a URL, with the key in it", func(c *Config) { c.Addr = "smtps://apikey:" + key + "@relay.example:465" }, []string{"ParseURL"}},
		{"a URL without its scheme", func(c *Config) { c.Addr = "apikey:" + key + "@relay.example" }, []string{"ParseURL"}},

		{"a user name without a password, which may be the key in the wrong place", func(c *Config) { c.Username, c.Password = key, "" },
			[]string{"Password is empty"}},
		{"Auth and a password", func(c *Config) { c.Auth = mechanism }, []string{"Auth is set together with Username or Password"}},
		{"Auth and a user name", func(c *Config) { *c = Config{Addr: "relay.example:25", Auth: mechanism, Username: "u"} }, []string{"Auth is set together"}},
		{"NUL in the password, which ends it in PLAIN", func(c *Config) { c.Password = key + "\x00x" }, []string{"NUL"}},
		{"NUL in the user name", func(c *Config) { c.Username = "a\x00b" }, []string{"NUL"}},
		{"a line end after the password, as from a file", func(c *Config) { c.Password = key + "\n" }, []string{"white space"}},
		{"a space before it", func(c *Config) { c.Password = " " + key }, []string{"white space"}},

		{"TLS mode too high", func(c *Config) { c.TLS = TLSNone + 1 }, []string{"TLS is 5"}},
		{"TLS mode too low", func(c *Config) { c.TLS = -1 }, []string{"TLS is -1"}},
		{"no TLS on a port for TLS", func(c *Config) { c.Addr, c.TLS = "relay.example:465", TLSNone }, []string{"TLSNone", "465"}},
		{"no TLS on the other port for TLS", func(c *Config) { c.Addr, c.TLS = "relay.example:2465", TLSNone }, []string{"TLSNone", "2465"}},
		{"TLS 1.1 at most", func(c *Config) { c.TLSConfig = &tls.Config{MaxVersion: tls.VersionTLS11} }, []string{"MaxVersion"}},
		{"TLS 1.2 at most", func(c *Config) { c.TLSConfig = &tls.Config{MaxVersion: tls.VersionTLS12} }, nil},
		{"pipelining mode too high", func(c *Config) { c.Pipelining = PipelineOff + 1 }, []string{"Pipelining is 3"}},
		{"pipelining mode too low", func(c *Config) { c.Pipelining = -1 }, []string{"Pipelining is -1"}},

		{"the name of this host", func(c *Config) { c.LocalName = "web-1.example.com" }, nil},
		{"an IPv4 literal", func(c *Config) { c.LocalName = "[192.0.2.1]" }, nil},
		{"an IPv6 literal", func(c *Config) { c.LocalName = "[IPv6:2001:db8::1]" }, nil},
		{"an IPv4 address that is not a literal", func(c *Config) { c.LocalName = "10.1.2.3" }, []string{`LocalName "10.1.2.3" is an address`, `"[10.1.2.3]"`}},
		{"an IPv6 address that is not a literal", func(c *Config) { c.LocalName = "2001:db8::1" }, []string{"LocalName", `"[IPv6:2001:db8::1]"`}},
		{"an IPv6 literal without its tag", func(c *Config) { c.LocalName = "[2001:db8::1]" }, []string{"LocalName", `"[IPv6:2001:db8::1]"`}},
		{"a part of an address", func(c *Config) { c.LocalName = "10.1.2" }, []string{"LocalName", "neither a domain name nor"}},
		{"an underscore", func(c *Config) { c.LocalName = "web_1.internal" }, []string{"LocalName", "underscore"}},
		{"a name of one label", func(c *Config) { c.LocalName = "web" }, nil},
		{"a literal without an address", func(c *Config) { c.LocalName = "[web]" }, []string{"LocalName"}},
		{"a command after the name", func(c *Config) { c.LocalName = "web\r\nMAIL FROM:<>" }, []string{"LocalName", `web\r\n`}},
		{"a name too long", func(c *Config) { c.LocalName = strings.Repeat("x.", 127) + "xx" }, []string{"LocalName"}},

		{"a negative number of connections", func(c *Config) { c.Limits.MaxConns = -1 }, []string{"Limits.MaxConns is -1"}},
		{"too many connections", func(c *Config) { c.Limits.MaxConns = 10001 }, []string{"Limits.MaxConns is 10001"}},
		{"the most connections", func(c *Config) { c.Limits.MaxConns = 10000 }, nil},
		{"another relay's password without an address", func(c *Config) { c.Addr, c.Username, c.Password = "", "", "POSTMARK-TOKEN" }, []string{"Addr is empty", "SendGrid"}},
		{"a negative number of messages in flight", func(c *Config) { c.MaxInFlight = -1 }, []string{"MaxInFlight is -1"}},
		{"too many in flight", func(c *Config) { c.MaxInFlight = 1001 }, []string{"MaxInFlight is 1001"}},
		{"a negative wait", func(c *Config) { c.Retry.MinBackoff = -1 }, []string{"MinBackoff"}},
		{"another negative wait", func(c *Config) { c.Retry.MaxBackoff = -1 }, []string{"MaxBackoff"}},
		{"MinBackoff above MaxBackoff", func(c *Config) { c.Retry = Retry{MinBackoff: 2 * time.Second, MaxBackoff: time.Second} }, []string{"1s", "2s"}},
		{"negative limits and times, which mean none", func(c *Config) {
			c.Limits = Limits{MaxMessagesPerConn: -1, MaxRecipients: -1, MaxConnAge: -1, MaxIdleTime: -1}
			c.Retry.MaxAttempts = -1
			c.Timeouts = Timeouts{Dial: -1, Greeting: -1, TLS: -1, Command: -1, Data: -1, Write: -1, FinalReply: -1, Unacked: -1, Drain: -1, Overlap: -1, Quit: time.Second}
		}, nil},
		{"all mistakes at once", func(c *Config) {
			*c = Config{Addr: "x", Password: key, TLS: 9, LocalName: "?", Limits: Limits{MaxConns: -3}}
		},
			[]string{`"x" has no port`, "TLS is 9", "LocalName", "MaxConns is -3"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			cfg := Config{Addr: "relay.example:587", Username: "u", Password: key}
			tt.edit(&cfg)
			client, err := New(cfg)
			if len(tt.says) == 0 {
				if err != nil {
					t.Fatalf("got %v, want it accepted", err)
				}
				client.Close()
				return
			}
			e, ok := errors.AsType[*Error](err)
			if !ok || client != nil {
				t.Fatalf("got %v, %v, want no Client and an *Error", client, err)
			}
			if e.Op != OpConfig || e.Outcome != NotAccepted || e.Temporary() {
				t.Errorf("got op %q, %v, temporary %v, want the configuration, not accepted, permanent", e.Op, e.Outcome, e.Temporary())
			}
			for _, words := range tt.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("got %q, which does not contain %q", err, words)
				}
			}
			if strings.Contains(err.Error(), "s3cret") {
				t.Errorf("got %q, which contains the key", err)
			}
			if strings.Contains(err.Error(), "<nil>") || strings.Contains(err.Error(), "%!") {
				t.Errorf("got %q, which has an empty part", err)
			}
		})
	}
}

func TestNameInEHLOIsOneThatRelaysAccept(t *testing.T) {
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	for _, tt := range []struct {
		why, host string
		local     net.Addr
		want      string
	}{
		{"the full name of this host", "web-1.example.com", tcp("192.0.2.1"), "web-1.example.com"},
		{"without the dot of the root", "web.example.com.", tcp("192.0.2.1"), "web.example.com"},
		{"a name without a domain", "web", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"an underscore", "web_1.internal", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"an empty label", "web..example", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"a hyphen at the end of a label", "web-.example", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"a label too long", strings.Repeat("x", 64) + ".example", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"characters that are not ASCII", "büro.example", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"an address for a name", "10.1.2.3", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"a loopback name, which has no meaning elsewhere", "LocalHost.localdomain", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"no name", "", tcp("192.0.2.1"), "[192.0.2.1]"},
		{"IPv6", "web", tcp("2001:db8::1"), "[IPv6:2001:db8::1]"},
		{"IPv4 within IPv6", "web", tcp("::ffff:192.0.2.1"), "[192.0.2.1]"},
		{"a connection of Config.Dial without an address", "web", &net.TCPAddr{}, "[127.0.0.1]"},
		{"one that is not TCP", "web", &net.UnixAddr{Name: "/run/relay"}, "[127.0.0.1]"},
		{"one without any local address", "web", nil, "[127.0.0.1]"},
	} {
		got := ehloName(tt.host, tt.local)
		if got != tt.want {
			t.Errorf("%s: %q: got %q, want %q", tt.why, tt.host, got, tt.want)
		}
		if !validHostName(got) && !validLiteral(got) {
			t.Errorf("%s: %q: got %q, which New would not accept as LocalName", tt.why, tt.host, got)
		}
	}
}

func TestZeroMeansTheDefaultAndNegativeMeansNone(t *testing.T) {
	s, err := Config{Password: "SG.k"}.check()
	if err != nil {
		t.Fatal(err)
	}
	if s.Addr != "smtp.sendgrid.net:587" || s.Username != "apikey" || s.host != "smtp.sendgrid.net" || s.port != "587" {
		t.Errorf("got %q, %q, %q, %q, want SendGrid's", s.Addr, s.Username, s.host, s.port)
	}
	if s.MaxInFlight != 4 {
		t.Errorf("got MaxInFlight %d, want 4", s.MaxInFlight)
	}
	if want := (Limits{MaxConns: 10, MaxMessagesPerConn: 100, MaxConnAge: 5 * time.Minute, MaxIdleTime: 30 * time.Second}); !reflect.DeepEqual(s.Limits, want) {
		t.Errorf("got %+v, want %+v", s.Limits, want)
	}
	if want := (Retry{MaxAttempts: 4, MinBackoff: 500 * time.Millisecond, MaxBackoff: 30 * time.Second}); !reflect.DeepEqual(s.Retry, want) {
		t.Errorf("got %+v, want %+v", s.Retry, want)
	}
	want := Timeouts{Outage: 2 * time.Minute, Dial: 30 * time.Second, Greeting: 30 * time.Second, TLS: 30 * time.Second, Command: 5 * time.Minute, Data: 2 * time.Minute,
		Write: 3 * time.Minute, FinalReply: 10 * time.Minute, Unacked: time.Minute, Drain: 2 * time.Second, Overlap: 5 * time.Second, Quit: 5 * time.Second}
	if !reflect.DeepEqual(s.Timeouts, want) {
		t.Errorf("got %+v, want %+v", s.Timeouts, want)
	}

	s, err = Config{
		Addr:     "relay.example:25",
		Limits:   Limits{MaxConns: 3, MaxMessagesPerConn: -1, MaxRecipients: -1, MaxConnAge: -1, MaxIdleTime: -1},
		Retry:    Retry{MaxAttempts: -1, MinBackoff: time.Minute},
		Timeouts: Timeouts{Outage: -1, Dial: -1, Greeting: -1, TLS: -1, Command: -1, Data: -1, Write: -1, FinalReply: -1, Unacked: -1, Drain: -1, Overlap: -1, Quit: time.Second},
	}.check()
	if err != nil {
		t.Fatal(err)
	}
	if s.Username != "" || s.authenticates() {
		t.Errorf("got user %q, authenticates %v, want no credentials", s.Username, s.authenticates())
	}
	if want := (Limits{MaxConns: 3}); !reflect.DeepEqual(s.Limits, want) {
		t.Errorf("got %+v, want %+v", s.Limits, want)
	}
	if want := (Retry{MinBackoff: time.Minute, MaxBackoff: time.Minute}); !reflect.DeepEqual(s.Retry, want) {
		t.Errorf("got %+v, want %+v", s.Retry, want)
	}
	if want := (Timeouts{Quit: time.Second}); !reflect.DeepEqual(s.Timeouts, want) {
		t.Errorf("got %+v, want %+v", s.Timeouts, want)
	}
}

func TestNewCopiesItsConfig(t *testing.T) {
	theirs := &tls.Config{}
	s, err := Config{Addr: "relay.example:587", TLSConfig: theirs}.check()
	if err != nil {
		t.Fatal(err)
	}
	if theirs.ServerName != "" || theirs.MinVersion != 0 || theirs.ClientSessionCache != nil {
		t.Errorf("the caller's tls.Config has become %q, %x, %v", theirs.ServerName, theirs.MinVersion, theirs.ClientSessionCache)
	}
	if s.tls.ServerName != "relay.example" || s.tls.MinVersion != tls.VersionTLS12 || s.tls.ClientSessionCache == nil {
		t.Errorf("got %q, %x, %v, want the host, TLS 1.2 and a cache", s.tls.ServerName, s.tls.MinVersion, s.tls.ClientSessionCache)
	}
	cache := tls.NewLRUClientSessionCache(1)
	theirs = &tls.Config{ServerName: "other.example", MinVersion: tls.VersionTLS13, ClientSessionCache: cache}
	if s, err = (Config{Addr: "relay.example:587", TLSConfig: theirs}).check(); err != nil {
		t.Fatal(err)
	}
	if s.tls.ServerName != "other.example" || s.tls.MinVersion != tls.VersionTLS13 || s.tls.ClientSessionCache != cache {
		t.Errorf("got %q, %x, %v, want the caller's values", s.tls.ServerName, s.tls.MinVersion, s.tls.ClientSessionCache)
	}
}

func TestPortAndHostDecideTheTLSThatIsNotSet(t *testing.T) {
	for _, tt := range []struct {
		why, addr            string
		mode                 TLSMode
		implicit, mail, auth bool // TLS from the first byte; what may be sent in plaintext
	}{
		{"the port of submissions (RFC 8314)", "relay.example:465", TLSByPort, true, false, false},
		{"the alternative one", "relay.example:2465", TLSByPort, true, false, false},
		{"the port of submission", "relay.example:587", TLSByPort, false, false, false},
		{"any other port", "relay.example:25", TLSByPort, false, false, false},
		{"this machine by name", "localhost:25", TLSByPort, false, true, true},
		{"this machine in upper case", "LOCALHOST:25", TLSByPort, false, true, true},
		{"this machine by address", "127.0.0.2:25", TLSByPort, false, true, true},
		{"and of IPv6", "[::1]:25", TLSByPort, false, true, true},
		{"this machine by IPv4 within IPv6", "[::ffff:127.0.0.1]:25", TLSByPort, false, true, true},
		{"a network of this machine is not this machine", "192.168.0.1:25", TLSByPort, false, false, false},
		{"a name that begins like this machine's", "localhost.example:25", TLSByPort, false, false, false},
		{"a name that looks like an address of this machine", "127.0.0.1.example:25", TLSByPort, false, false, false},
		{"STARTTLS when asked for, on this machine too", "localhost:465", TLSStartTLS, false, false, true},
		{"implicit TLS when asked for", "localhost:25", TLSImplicit, true, false, true},
		{"none when asked for", "relay.example:25", TLSNone, false, true, false},
		{"opportunistic: none, if the relay does not offer it", "relay.example:587", TLSOpportunistic, false, true, false},
		{"opportunistic on a port for TLS", "relay.example:465", TLSOpportunistic, true, true, false},
	} {
		s, err := Config{Addr: tt.addr, TLS: tt.mode}.check()
		if err != nil {
			t.Errorf("%s: %v", tt.why, err)
			continue
		}
		client, relay := net.Pipe() // its address does not say where it leads
		mail, auth := s.clear(client)
		if s.implicit() != tt.implicit || mail != tt.mail || auth != tt.auth {
			t.Errorf("%s: %s, %v: got implicit %v, in plaintext mail %v and credentials %v, want %v, %v, %v",
				tt.why, tt.addr, tt.mode, s.implicit(), mail, auth, tt.implicit, tt.mail, tt.auth)
		}
		client.Close()
		relay.Close()
	}
}

func TestURLBecomesAConfig(t *testing.T) {
	for _, tt := range []struct {
		why, url string
		want     Config
	}{
		{"smtps is TLS from the first byte", "smtps://apikey:SG.x@smtp.sendgrid.net", Config{Addr: "smtp.sendgrid.net:465", Username: "apikey", Password: "SG.x", TLS: TLSImplicit}},
		{"smtp is STARTTLS", "smtp://u:p@relay.example", Config{Addr: "relay.example:587", Username: "u", Password: "p"}},
		{"smtp+insecure is neither", "smtp+insecure://relay.example", Config{Addr: "relay.example:25", TLS: TLSNone}},
		{"schemes are case-insensitive (RFC 3986, 3.1)", "SMTP://relay.example", Config{Addr: "relay.example:587"}},
		{"an explicit port", "smtps://u:p@relay.example:2465", Config{Addr: "relay.example:2465", Username: "u", Password: "p", TLS: TLSImplicit}},
		{"no port after the colon", "smtps://relay.example:", Config{Addr: "relay.example:465", TLS: TLSImplicit}},
		{"a slash after the host", "smtp://relay.example/", Config{Addr: "relay.example:587"}},
		{"an IPv6 address", "smtp://[2001:db8::1]:25", Config{Addr: "[2001:db8::1]:25"}},
		{"no user name, at SendGrid: apikey is added later", "smtp://:p@smtp.sendgrid.net", Config{Addr: "smtp.sendgrid.net:587", Password: "p"}},
		{"percent-encoding in both", "smtp://a%40x.example:p%2F%3F%23%25%20%3A%40@relay.example",
			Config{Addr: "relay.example:587", Username: "a@x.example", Password: "p/?#% :@"}},
		{"the last at sign ends the password", "smtp://u:p@ss@relay.example", Config{Addr: "relay.example:587", Username: "u", Password: "p@ss"}},
		{"a plus is a plus", "smtp://u:a+b@relay.example", Config{Addr: "relay.example:587", Username: "u", Password: "a+b"}},
		{"numbers", "smtp://relay.example?max_conns=3&max_messages=-1&max_recipients=50&max_in_flight=2&max_attempts=1",
			Config{Addr: "relay.example:587", Limits: Limits{MaxConns: 3, MaxMessagesPerConn: -1, MaxRecipients: 50}, MaxInFlight: 2, Retry: Retry{MaxAttempts: 1}}},
		{"durations", "smtp://relay.example?max_idle=45s&max_age=-1s",
			Config{Addr: "relay.example:587", Limits: Limits{MaxIdleTime: 45 * time.Second, MaxConnAge: -time.Second}}},
		{"words", "smtp://relay.example?local_name=web.example&pipelining=within",
			Config{Addr: "relay.example:587", LocalName: "web.example", Pipelining: PipelineWithin}},
		{"other words", "smtp://relay.example?local_name=[192.0.2.1]&pipelining=off", Config{Addr: "relay.example:587", LocalName: "[192.0.2.1]", Pipelining: PipelineOff}},
		{"the default, explicitly", "smtp://relay.example?pipelining=across", Config{Addr: "relay.example:587"}},
		{"no TLS and credentials: the scheme's name says that they are sent in plaintext", "smtp+insecure://u:p@relay.example",
			Config{Addr: "relay.example:25", Username: "u", Password: "p", TLS: TLSNone, AllowInsecureAuth: true}},
		{"TLS by chance", "smtp://relay.example:25?tls=opportunistic", Config{Addr: "relay.example:25", TLS: TLSOpportunistic}},
		{"TLS by a parameter", "smtp://relay.example:2525?tls=implicit", Config{Addr: "relay.example:2525", TLS: TLSImplicit}},
		{"the scheme's own TLS mode", "smtp+insecure://relay.example?tls=none", Config{Addr: "relay.example:25", TLS: TLSNone}},
		{"switches", "smtp://u:p@relay.example?chunking=on&retry_4xx=on&insecure_auth=on&tls=none",
			Config{Addr: "relay.example:587", Username: "u", Password: "p", Chunking: true, Retry: Retry{On4xx: true}, TLS: TLSNone, AllowInsecureAuth: true}},
		{"waits between tries", "smtp://relay.example?min_backoff=1s&max_backoff=1m", Config{Addr: "relay.example:587", Retry: Retry{MinBackoff: time.Second, MaxBackoff: time.Minute}}},
		{"time limits", "smtp://relay.example?dial_timeout=1s&greeting_timeout=2s&tls_timeout=3s&command_timeout=4s&data_timeout=5s&write_timeout=6s" +
			"&final_reply_timeout=7s&overlap_timeout=8s&quit_timeout=9s",
			Config{Addr: "relay.example:587", Timeouts: Timeouts{Dial: time.Second, Greeting: 2 * time.Second, TLS: 3 * time.Second, Command: 4 * time.Second,
				Data: 5 * time.Second, Write: 6 * time.Second, FinalReply: 7 * time.Second, Overlap: 8 * time.Second, Quit: 9 * time.Second}}},
		{"a label", "smtp://relay.example?name=shop", Config{Addr: "relay.example:587", Name: "shop"}},
		{"another name in the certificate", "smtp://10.0.0.1?server_name=relay.example", Config{Addr: "10.0.0.1:587", TLSConfig: &tls.Config{ServerName: "relay.example"}}},

		{"SendGrid by name", "sendgrid://:SG.x@", Config{Addr: "smtp.sendgrid.net:587", Username: "apikey", Password: "SG.x",
			Limits: Limits{MaxConns: 10, MaxMessagesPerConn: 100, MaxRecipients: 1000}}},
		{"its host in the EU, its port for TLS, and the query takes precedence", "sendgrid://:SG.x@eu:465?max_conns=3", Config{Addr: "smtp.eu.sendgrid.net:465", Username: "apikey", Password: "SG.x",
			Limits: Limits{MaxConns: 3, MaxMessagesPerConn: 100, MaxRecipients: 1000}}},
		{"SES in a region", "ses://u:p@eu-west-1", Config{Addr: "email-smtp.eu-west-1.amazonaws.com:587", Username: "u", Password: "p", Limits: Limits{MaxRecipients: 50}}},
		{"Postmark's token is both", "postmark://:t@broadcasts", Config{Addr: "smtp-broadcasts.postmarkapp.com:587", Username: "t", Password: "t", Limits: Limits{MaxConns: 10, MaxRecipients: 50}}},
		{"or a key of a stream", "postmark://access:secret@", Config{Addr: "smtp.postmarkapp.com:587", Username: "access", Password: "secret", Limits: Limits{MaxConns: 10, MaxRecipients: 50}}},
		{"an address as user name", "gmail://ann@gmail.com:p@", Config{Addr: "smtp.gmail.com:587", Username: "ann@gmail.com", Password: "p"}},
		{"Mailpit needs nothing", "mailpit://", Config{Addr: "localhost:1025"}},
		{"and may be on another host", "mailpit://mail.lan:25?tls=none", Config{Addr: "mail.lan:25", TLS: TLSNone}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got, err := ParseURL(tt.url)
			if err != nil {
				t.Fatalf("%s: %v", tt.url, err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				type plain Config // prints the password
				t.Errorf("%s: got %+v, want %+v", tt.url, plain(got), plain(tt.want))
			}
		})
	}
}

func TestInvalidURLIsRefusedWithAReason(t *testing.T) {
	for _, tt := range []struct {
		why, url string // the secret, if any, contains s3cret
		says     []string
	}{
		{"nothing", "", []string{"the URL is empty"}},
		{"a host alone", "relay.example", []string{"no scheme"}},
		{"host and port alone, whose host looks like a scheme", "relay.example:587", []string{"no scheme"}},
		{"user and password without scheme, whose user is the key too (Postmark)", "s3cret:s3cret@relay.example", []string{"no scheme"}},
		{"a line end after it, as from a file", "smtp://u:s3cret@relay.example\n", []string{"white space", "newline"}},
		{"a space before it", " smtp://u:s3cret@relay.example", []string{"white space"}},
		{"another scheme", "https://u:s3cret@relay.example", []string{`"https"`, "smtps"}},
		{"no host", "smtp://u:s3cret@", []string{"no host"}},
		{"no host but a port", "smtp://:587", []string{"no host"}},
		{"a port that is not a number", "smtp://u:s3cret@relay.example:submission", []string{"cannot be parsed", "percent-encoded"}},
		{"an IPv6 address without brackets, whose end is taken for the port", "smtp://u:s3cret@2001:db8::1", []string{"IPv6"}},
		{"a port too high", "smtp://u:s3cret@relay.example:65536", []string{"1 to 65535"}},
		{"port 0", "smtp://u:s3cret@relay.example:0", []string{"1 to 65535"}},
		{"a path", "smtp://u:s3cret@relay.example/x", []string{"path"}},
		{"a fragment", "smtp://u:s3cret@relay.example#x", []string{"fragment"}},
		{"a password without a user name", "smtp://:s3cret@relay.example", []string{"Username is empty"}},
		{"the URL of a socket", "unix:///run/relay.sock", []string{"Config.Dial"}},
		{"the path of a socket", "/run/relay.sock", []string{"Config.Dial"}},
		{"several at once", " https://:s3cret@relay.example:99999/x?max_conns=-1&max_idle=3#y", []string{"white space", "path", "fragment", `"https"`, "Username is empty", "1 to 65535", "MaxConns is -1", "max_idle"}},
		{"no host, and another mistake", "smtp://u:s3cret@?local_name=_", []string{"no host", "LocalName"}},
		{"white space around an invalid URL", "smtp://u:s3cret@relay.example:x ", []string{"white space", "port is not a number"}},
		{"a lone percent sign", "smtp://u:s3cret%@relay.example", []string{"hexadecimal"}},
		{"a control character", "smtp://u:s3cret@relay\x01.example", []string{"control character"}},
		{"an IPv6 address that is not closed", "smtp://u:s3cret@[::1", []string{"closed by ]"}},
		{"a user without a password, which may be the key", "smtp://s3cret@relay.example", []string{"Password is empty"}},
		{"no password for SendGrid", "smtp://smtp.sendgrid.net", []string{"Password is empty"}},
		{"a parameter that is unknown", "smtp://u:s3cret@relay.example?max_con=1", []string{`"max_con"`}},
		{"a parameter in upper case", "smtp://relay.example?MAX_CONNS=1", []string{`"MAX_CONNS"`}},
		{"a parameter given twice", "smtp://relay.example?max_conns=1&max_conns=2", []string{"max_conns", "twice"}},
		{"not a number", "smtp://relay.example?max_conns=ten", []string{"max_conns", "ten", "whole number"}},
		{"an empty number", "smtp://relay.example?max_conns", []string{"max_conns", "whole number"}},
		{"a number out of bounds", "smtp://relay.example?max_conns=-1", []string{"Limits.MaxConns is -1"}},
		{"a duration without its unit", "smtp://relay.example?max_idle=30", []string{"max_idle", "30s"}},
		{"another mode of pipelining", "smtp://relay.example?pipelining=on", []string{"pipelining", "auto, within or off"}},
		{"not a name", "smtp://relay.example?local_name=a%0Db", []string{"LocalName", `a\rb`}},
		{"a line end in a number", "smtp://relay.example?max_conns=1%0A", []string{"max_conns", `1\n`}},
		{"all mistakes at once", "ftp://?max_conns=x&no=1", []string{`"ftp"`, "no host", "max_conns", `"no"`}},
		{"mistakes of the query and of New", "smtp://s3cret@relay.example:0?max_conns=x&chunking=yes&local_name=?&quit_timeout=-1s",
			[]string{"max_conns", "chunking", "on or off", "1 to 65535", "Password is empty", "LocalName", "Quit"}},
		{"TLS although the scheme says none", "smtp+insecure://relay.example?tls=starttls", []string{"tls=starttls", "none", "smtp://"}},
		{"no TLS although the scheme says TLS", "smtps://relay.example?tls=opportunistic", []string{"tls=opportunistic", "implicit"}},
		{"an unknown TLS mode", "smtp://relay.example?tls=maybe", []string{`tls="maybe"`, "opportunistic"}},
		{"a missing file of roots", "smtp://relay.example?ca=testdata/no-such-file", []string{`ca="testdata/no-such-file"`, "no such file"}},
		{"a file without roots", "smtp://relay.example?ca=go.mod", []string{`ca="go.mod"`, "PEM"}},
		{"no key for SendGrid by name", "sendgrid://", []string{"no password", "sendgrid://:SECRET@"}},
		{"a key in place of the user", "sendgrid://s3cret@", []string{"no password", "sendgrid://:SECRET@"}},
		{"a key in place of the host", "sendgrid://s3cret", []string{"no such host", `"eu"`, "no password"}},
		{"no user for SES", "ses://:s3cret@eu-west-1", []string{"no user name", "SES"}},
		{"no region", "ses://u:s3cret@", []string{"region", "eu-west-1"}},
		{"a region that is another host", "ses://u:s3cret@evil.example", []string{"region"}},

		// Passwords that are not percent-encoded: the URL ends early, and the rest of the password is in a part that may be
		// shown.
		{"a slash", "smtp://u:1/s3cret@relay.example", []string{"percent-encoded"}},
		{"a number sign", "smtp://u:1#s3cret@relay.example", []string{"percent-encoded"}},
		{"a question mark", "smtp://u:1?s3cret@relay.example", []string{"percent-encoded"}},
		{"a question mark and what looks like a parameter", "smtp://u:1?max_conns=s3cret@relay.example", []string{"percent-encoded"}},
		{"a question mark and a number sign", "smtp://u:1?max_conns=s3cret#@relay.example", []string{"percent-encoded"}},
		{"a slash and a question mark", "smtp://u:1/?no=s3cret@relay.example", []string{"percent-encoded"}},
		{"a percent sign", "smtp://u:s3cret%zz@relay.example", []string{"percent-encoded"}},
		{"a percent sign in what looks like a query", "smtp://u:1?s3cret=%zz@relay.example", []string{"percent-encoded"}},
		{"a bracket", "smtp://u:[s3cret@relay.example", []string{"percent-encoded"}},
		{"a space", "smtp://u:s3cret x@relay.example", []string{"percent-encoded"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			cfg, err := ParseURL(tt.url)
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("%s: got %v, %v, want an *Error", tt.url, cfg, err)
			}
			if e.Op != OpConfig || e.Outcome != NotAccepted || e.Temporary() || !reflect.DeepEqual(cfg, Config{}) {
				t.Errorf("got %v, op %q, %v, temporary %v, want nothing, the configuration, not accepted, permanent", cfg, e.Op, e.Outcome, e.Temporary())
			}
			for _, words := range tt.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("%s: got %q, which does not contain %q", tt.url, err, words)
				}
			}
			if strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%s: got %q, which contains the secret", tt.url, err)
			}
			lines := strings.Split(err.Error(), "; ")
			if slices.Sort(lines); len(slices.Compact(slices.Clone(lines))) != len(lines) {
				t.Errorf("%s: got %q, which repeats itself", tt.url, err)
			}
		})
	}
}

func TestURLNamesTheRoots(t *testing.T) {
	relay := httptest.NewTLSServer(nil)
	defer relay.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: relay.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := ParseURL("smtps://relay.example?ca=" + url.QueryEscape(file))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := relay.Certificate().Verify(x509.VerifyOptions{Roots: cfg.TLSConfig.RootCAs}); err != nil {
		t.Errorf("the certificate does not verify with these roots: %v", err)
	}
}

// printed returns c in every form in which a program may print it, also as a field of a struct.
func printed(c Config) string {
	var b strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&b, verb+"\n"+verb+"\n"+verb+"\n", c, &c, struct{ Relay Config }{c})
	}
	asJSON, err := json.Marshal(map[string]any{"relay": c, "pointer": &c})
	fmt.Fprintln(&b, string(asJSON), err)
	slog.New(slog.NewTextHandler(&b, nil)).Info("relay", "cfg", c, "pointer", &c)
	slog.New(slog.NewJSONHandler(&b, nil)).Info("relay", "cfg", c, "pointer", &c)
	return b.String()
}

func TestConfigIsPrintedWithoutItsSecret(t *testing.T) {
	for _, tt := range []struct {
		why string
		cfg Config
	}{
		{"a password", Config{Addr: "relay.example:587", Username: "ann", Password: "s3cret"}},
		{"a token that is user name and password, as at Postmark", Config{Addr: "relay.example:587", Username: "s3cret", Password: "s3cret"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := printed(tt.cfg)
			for line := range strings.SplitSeq(got, "\n") {
				if strings.Contains(line, "s3cret") || strings.Contains(line, fmt.Sprintf("%x", "s3cret")) {
					t.Errorf("the secret is in %s", line)
				}
			}
			if !strings.Contains(got, "[redacted]") || !strings.Contains(got, "relay.example:587") {
				t.Errorf("got\n%s\nwithout [redacted] or the address", got)
			}
			if tt.cfg.Username != tt.cfg.Password && !strings.Contains(got, "ann") {
				t.Errorf("got\n%s\nwithout the user name", got)
			}
		})
	}
	if got := printed(Config{Addr: "relay.example:587"}); strings.Contains(got, "redacted") {
		t.Errorf("got\n%s\nas if it had a password", got)
	}
}

func TestSecretDoesNotPrint(t *testing.T) {
	s := newSecret("s3cret")
	if s.reveal() != "s3cret" {
		t.Errorf("got %q, want the original", s.reveal())
	}
	var b strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&b, verb+" "+verb+"\n", s, struct{ s secret }{s})
	}
	b.WriteString(s.String() + s.GoString())
	asJSON, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	b.Write(asJSON)
	slog.New(slog.NewTextHandler(&b, nil)).Info("secret", "s", s)
	if got := b.String(); strings.Contains(got, "s3cret") || strings.Contains(got, "7333637265") {
		t.Errorf("got\n%s", got)
	}
}

// FuzzParseURL puts a password into a URL with anything around it, percent-encoded or not. In any case an error does not show the
// password, and a Config has it where it is not printed, and is valid for New.
func FuzzParseURL(f *testing.F) {
	for _, seed := range []struct{ scheme, user, before, after, rest string }{
		{"smtps://", "apikey", "SG.", "_x-y", "smtp.sendgrid.net:465?max_conns=10"},
		{"smtp://", "u", "1?max_conns=", "", "relay.example"},
		{"smtp://", "u", "1?local_name=", "#", "relay.example"},
		{"smtp://", "u", "1/", "", "relay.example?max_idle=30s&pipelining=off"},
		{"smtp://", "", "@", "?", "relay.example"},
		{"smtp+insecure://", "u", "%40", "%zz", "[::1]:25"},
		{"", "u", "", "", "relay.example:587"},
		{"ftp://", "u:", " ", "\n", "relay.example/#x"},
		{"smtp:", "u", "", "", "relay"},
		{"smtp://", "u", "", "", "[fe80::1%25eth0]:25"},
		{"smtp://", "u", "", "", "relay::::example"},
		{"sendgrid://", "", "SG.", "", "eu"},
		{"ses://", "u", "", "", "eu-west-1?tls=opportunistic"},
		{"postmark://", "", "", "", "?name=x"},
		{"mailpit://", "u", "", "", "[::1]"},
	} {
		f.Add(seed.scheme, seed.user, seed.before, seed.after, seed.rest)
	}
	const password = "s3cretPassw0rd"
	f.Fuzz(func(t *testing.T, scheme, user, before, after, rest string) {
		raw := scheme + user + ":" + before + password + after + "@" + rest
		cfg, err := ParseURL(raw)
		if err != nil {
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Errorf("%q: got %T, want an *Error", raw, err)
			}
			if strings.Contains(strings.ToLower(err.Error()), strings.ToLower(password)) {
				t.Errorf("%q: the password is in %q", raw, err)
			}
			for line := range strings.SplitSeq(err.Error(), "\n") { // from errors.Join
				if strings.ContainsFunc(line, unicode.IsControl) {
					t.Errorf("%q: a control character is in %q", raw, err)
				}
			}
			return
		}
		if !strings.Contains(cfg.Password, password) {
			type plain Config
			t.Errorf("%q: the password is missing in %+v", raw, plain(cfg))
		}
		if got := printed(cfg); strings.Contains(got, password) {
			t.Errorf("%q: printed as\n%s", raw, got)
		}
		client, err := New(cfg)
		if err != nil {
			t.Fatalf("%q: New says %v", raw, err)
		}
		client.Close()

		// The parts, properly encoded, make the same Config.
		again := &url.URL{Scheme: "smtp", User: url.UserPassword(cfg.Username, cfg.Password), Host: cfg.Addr}
		got, err := ParseURL(again.String())
		if err != nil || got.Addr != cfg.Addr || got.Username != cfg.Username || got.Password != cfg.Password {
			type plain Config
			t.Errorf("%q, written and parsed again: got %+v, %v, want %+v", raw, plain(got), err, plain(cfg))
		}
	})
}

// The Registry's key of a Config.

// noSlots has no slots.
type noSlots struct{ Slots }

// For each field, including future ones, another value means another Client, or needs a Name.
func TestEachFieldOfAConfigDistinguishesClients(t *testing.T) {
	seen := map[fingerprint.Sum]string{}
	key := func(c Config) fingerprint.Sum {
		sum, err := c.key()
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	seen[key(Config{})] = "nothing"
	var walk func(path string, c *Config, v reflect.Value)
	walk = func(path string, c *Config, v reflect.Value) {
		for i := range v.NumField() {
			f, name := v.Field(i), path+v.Type().Field(i).Name
			if !f.CanSet() {
				continue
			}
			switch f.Kind() {
			case reflect.Struct:
				walk(name+".", c, f)
				continue
			case reflect.String:
				f.SetString("x")
			case reflect.Bool:
				f.SetBool(true)
			case reflect.Int, reflect.Int64:
				f.SetInt(1)
			case reflect.Float64:
				f.SetFloat(1)
			case reflect.Func:
				f.Set(reflect.MakeFunc(f.Type(), func([]reflect.Value) []reflect.Value { return nil }))
			case reflect.Pointer:
				f.Set(reflect.New(f.Type().Elem()))
			case reflect.Interface:
				f.Set(reflect.ValueOf(noSlots{}))
			default:
				t.Errorf("%s is a %v, which this test does not support", name, f.Kind())
				continue
			}
			if f.Kind() == reflect.Func || f.Kind() == reflect.Pointer || f.Kind() == reflect.Interface {
				if _, err := c.key(); err == nil {
					t.Errorf("%s needs no Name", name)
				}
				c.Name = "shop"
			}
			sum := key(*c)
			if other, ok := seen[sum]; ok {
				t.Errorf("%s and %s: the same", name, other)
			}
			seen[sum] = name
			f.SetZero()
			c.Name = ""
		}
	}
	var c Config
	walk("", &c, reflect.ValueOf(&c).Elem())
}

func TestTLSConfigsServerNameDistinguishesClients(t *testing.T) {
	one := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "a.example"}}
	same := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "a.example"}, Dial: nil}
	other := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "b.example"}}
	unsafe := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "a.example", InsecureSkipVerify: true}}
	dialled := Config{Name: "shop", Dial: func(context.Context, string, string) (net.Conn, error) { return nil, nil }}
	a, _ := one.key()
	for why, want := range map[string]struct {
		c    Config
		same bool
	}{"the same": {same, true}, "another name": {other, false}, "not verified": {unsafe, false}, "with a Dial": {dialled, false}} {
		if b, _ := want.c.key(); (a == b) != want.same {
			t.Errorf("%s: got the same: %v", why, a == b)
		}
	}
}
