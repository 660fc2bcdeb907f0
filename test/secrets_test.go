// The secrecy of keys: in no trace, log, error or dump.
package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"net/url"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestKeyIsNotReportedWhenA421QuotesIt(t *testing.T) {
	for i, ext := range []string{"250 AUTH PLAIN", "250-PIPELINING\n250 AUTH PLAIN"} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b64 := base64.StdEncoding.EncodeToString([]byte("\x00u\x00secretkey"))
				leak := func(where string, v any) {
					if s := fmt.Sprintf("%v", v); strings.Contains(s, b64) || strings.Contains(s, "secretkey") {
						t.Errorf("leak in %s: %s", where, s)
					}
				}
				c := bubbleClient(t, smtprelay.Config{Username: "u", Password: "secretkey", Retry: smtprelay.Retry{MaxAttempts: 1},
					Trace: &smtprelay.Trace{
						DialDone:   func(_ context.Context, d smtprelay.DialDoneInfo) { leak("DialDone", d.Err) },
						ConnClosed: func(_ context.Context, d smtprelay.ConnClosedInfo) { leak("ConnClosed", d.Err) },
					},
					Dial: relaytest.Dial(0, func(_ int, l string) string {
						if strings.HasPrefix(l, "AUTH") {
							return "421 4.7.0 too many errors after: " + l
						}
						return relaytest.Agree(ext, l)
					})})
				_, err := c.Send(t.Context(), shortMessage("b@y.example"))
				leak("Send", err)
				c.Close()
			})
		})
	}
}

// leaksOf returns the forms of the key that output contains.
func leaksOf(output string) []string {
	var leaks []string
	for form, text := range map[string]string{
		"the key":                      secretKey,
		"its base64":                   base64.StdEncoding.EncodeToString([]byte(secretKey)),
		"its base64, unpadded":         base64.RawStdEncoding.EncodeToString([]byte(secretKey)),
		"its base64 for URLs":          base64.RawURLEncoding.EncodeToString([]byte(secretKey)),
		"AUTH PLAIN's response":        base64.StdEncoding.EncodeToString([]byte("\x00" + secretUser + "\x00" + secretKey)),
		"its hex":                      hex.EncodeToString([]byte(secretKey)),
		"the key escaped in a URL":     url.PathEscape(secretKey),
		"the key as a query parameter": url.QueryEscape(secretKey),
		"its bytes in decimal":         strings.Trim(fmt.Sprint([]byte(secretKey)), "[]"),
	} {
		if strings.Contains(strings.ToLower(output), strings.ToLower(text)) {
			leaks = append(leaks, form)
		}
	}
	return leaks
}

// Without recognising the key the other tests would show nothing.
func TestLeaksAreRecognised(t *testing.T) {
	type config struct{ Password string }
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%X"} {
		if output := fmt.Sprintf(verb, config{secretKey}); len(leaksOf(output)) == 0 {
			t.Errorf("%s of a plain struct: the key in %q is not recognised", verb, output)
		}
	}
}

// dump returns v in every form in which a program may print it.
func dump(v any) string {
	var b bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		fmt.Fprintf(&b, verb+"\n", v)
	}
	fmt.Fprintln(&b, v)
	if j, err := json.Marshal(v); err == nil {
		b.Write(j)
	}
	slog.New(slog.NewTextHandler(&b, nil)).Info("dump", "value", v)
	slog.New(slog.NewJSONHandler(&b, nil)).Info("dump", "value", v)
	return b.String()
}

// everyHook returns a Trace with all hooks set, each of which passes its arguments to see.
func everyHook(see func(hook string, args ...any)) *smtprelay.Trace {
	trace := new(smtprelay.Trace)
	v := reflect.ValueOf(trace).Elem()
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		v.Field(i).Set(reflect.MakeFunc(v.Field(i).Type(), func(args []reflect.Value) []reflect.Value {
			plain := make([]any, len(args))
			for i, a := range args {
				plain[i] = a.Interface()
			}
			see(name, plain...)
			if name == "SendStart" {
				return args[:1]
			}
			return nil
		}))
	}
	return trace
}

// scenario is a course of a client's life; everything that can be printed about it is.
type scenario struct {
	name   string
	relay  func(*smtptest.Server)
	faults []smtptest.Fault
	client func(*smtprelay.Config)
}

var scenarios = []scenario{
	{name: "all is well"},
	{name: "AUTH LOGIN", relay: func(s *smtptest.Server) { s.Mechanisms = []string{"LOGIN"} }},
	{name: "no mechanism in common", relay: func(s *smtptest.Server) {
		s.Mechanisms = []string{"X-ODD"}
		s.SASL = func(string) (smtptest.SASLServer, error) { return nil, errors.New("odd") }
	}},
	{name: "wrong password", relay: func(s *smtptest.Server) { s.Password = "another" }},
	{name: "the relay echoes the AUTH line in its refusal", faults: []smtptest.Fault{{
		At: smtptest.Auth, Count: -1,
		Reply: "500 5.5.1 Command unrecognized: \"AUTH PLAIN " +
			base64.StdEncoding.EncodeToString([]byte("\x00"+secretUser+"\x00"+secretKey)) + "\"",
	}}},
	{name: "the relay echoes the key in its refusal", faults: []smtptest.Fault{{
		At: smtptest.Auth, Reply: "535 5.7.8 Invalid key " + secretKey, Count: -1,
	}}},
	{name: "421 at AUTH", faults: []smtptest.Fault{{At: smtptest.Auth, Reply: "421 4.7.0 too many", Drop: true, Count: -1}}},
	{name: "lost at AUTH", faults: []smtptest.Fault{{At: smtptest.Auth, Drop: true, Count: -1}}},
	{name: "malformed reply to AUTH", faults: []smtptest.Fault{{At: smtptest.Auth, Reply: "what?", Count: -1}}},
	{name: "no TLS", relay: func(s *smtptest.Server) { s.NoTLS = true }, client: func(c *smtprelay.Config) { c.TLS = smtprelay.TLSStartTLS }},
	{name: "certificate of an unknown authority", client: func(c *smtprelay.Config) { c.TLSConfig = &tls.Config{} }},
	{name: "refused at RCPT", faults: []smtptest.Fault{{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user", Count: -1}}},
	{name: "refused at the final dot", faults: []smtptest.Fault{{At: smtptest.FinalDot, Reply: "554 no", Count: -1}}},
	{name: "lost at the final dot", faults: []smtptest.Fault{{At: smtptest.FinalDot, Drop: true, Count: -1}}},
	{name: "key from Config.Auth", client: keyByAuth},
	{name: "key from Config.Auth, echoed", client: keyByAuth, faults: []smtptest.Fault{{
		At: smtptest.Auth, Count: -1,
		Reply: "500 5.5.1 Command unrecognized: \"AUTH PLAIN " +
			base64.StdEncoding.EncodeToString([]byte("\x00"+secretUser+"\x00"+secretKey)) + "\"",
	}}},
}

func keyByAuth(c *smtprelay.Config) {
	c.Username, c.Password = "", ""
	c.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
		return sasl.NewPlainClient("", secretUser, secretKey), nil
	}
}

func TestKeyIsInNoTraceLogOrError(t *testing.T) {
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			relay := newRelay(t, func(server *smtptest.Server) {
				server.Username, server.Password = secretUser, secretKey
				if s.relay != nil {
					s.relay(server)
				}
			})
			for _, f := range s.faults {
				relay.Fault(f)
			}

			// Once with all hooks, and once with the Trace that logs, since a client has one Trace.
			var hooks, logs lockedBuffer
			seen := map[string]bool{}
			var mu sync.Mutex // guards seen
			traces := map[string]*smtprelay.Trace{
				"hook": everyHook(func(hook string, args ...any) {
					mu.Lock()
					seen[hook] = true
					mu.Unlock()
					for _, a := range args {
						if _, isContext := a.(context.Context); !isContext {
							fmt.Fprintf(&hooks, "%s: %s\n", hook, dump(a))
						}
					}
				}),
				"log": smtprelay.LogTrace(slog.New(slog.NewJSONHandler(&logs, &slog.HandlerOptions{Level: slog.LevelDebug}))),
			}
			var rest bytes.Buffer
			for name, trace := range traces {
				cfg := configOf(relay)
				cfg.Username, cfg.Password = secretUser, secretKey
				cfg.Retry = smtprelay.Retry{MaxAttempts: 2, MinBackoff: time.Millisecond, MaxBackoff: time.Millisecond}
				cfg.Timeouts.Outage = 100 * time.Millisecond
				cfg.Trace = trace
				if s.client != nil {
					s.client(&cfg)
				}
				client := newClient(t, cfg)
				receipt, err := client.Send(t.Context(), numbered(0))
				fmt.Fprintf(&rest, "%s\n%s\n", dump(receipt), dump(err))
				for ; err != nil; err = errors.Unwrap(err) {
					fmt.Fprintln(&rest, dump(err))
				}
				fmt.Fprintln(&rest, dump(client.Ping(t.Context())))
				fmt.Fprintln(&rest, dump(client), dump(client.Stats()), name)
				client.Close()
			}

			for what, output := range map[string]string{
				"the hooks": hooks.String(), "LogTrace at debug level": logs.String(), "errors, receipts, Client, Stats": rest.String(),
			} {
				if output == "" {
					t.Errorf("%s: no output, so this test shows nothing", what)
				}
				for _, leak := range leaksOf(output) {
					t.Errorf("%s contains %s:\n%s", what, leak, excerpt(output))
				}
			}
			if s.name == "all is well" {
				for _, hook := range []string{"SendStart", "DialStart", "DialDone", "GotConn", "Command", "Reply", "SendDone", "ConnClosed"} {
					if !seen[hook] {
						t.Errorf("hook %s was never called", hook)
					}
				}
			}
		})
	}
}

// excerpt returns the first lines of output that contain the key.
func excerpt(output string) string {
	var lines []string
	for line := range strings.Lines(output) {
		if len(lines) < 5 && len(leaksOf(line)) > 0 {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// Every exported type, found in the source, so that a new one must be added here too.
func TestKeyIsInNoDumpOfAnyExportedType(t *testing.T) {
	client := newClient(t, smtprelay.Config{Username: secretUser, Password: secretKey})
	cfg := smtprelay.Config{
		Username: secretUser,
		Password: secretKey,
		Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewPlainClient("", secretUser, secretKey), nil
		},
		TLSConfig: &tls.Config{},
		Trace:     smtprelay.LogTrace(slog.Default()),
	}
	_, configErr := smtprelay.New(smtprelay.Config{Addr: "no port", Password: secretKey})
	var e *smtprelay.Error
	if !errors.As(configErr, &e) {
		t.Fatalf("got %v, want an *Error", configErr)
	}
	reply := smtprelay.Reply{Code: 535, Message: "no"}
	registry := &smtprelay.Registry{} // with a Client in it
	if _, err := registry.Send(t.Context(), smtprelay.Config{Addr: closedPort(t), Username: secretUser, Password: secretKey,
		Retry: smtprelay.Retry{MaxAttempts: 1}}, numbered(0)); err == nil {
		t.Fatal("the message was sent")
	}
	defer registry.Shutdown(t.Context())

	values := map[string]any{
		"CommandInfo":     smtprelay.CommandInfo{},
		"ConnClosedInfo":  smtprelay.ConnClosedInfo{Err: e},
		"Client":          client,
		"Config":          cfg,
		"BodyType":        smtprelay.Body8BitMIME,
		"DSNAddressType":  smtprelay.DSNAddressTypeRFC822,
		"DSNNotify":       smtprelay.DSNNotifyNever,
		"DSNReturn":       smtprelay.DSNReturnFull,
		"DeliverBy":       smtprelay.DeliverBy{},
		"DeliverByMode":   smtprelay.DeliverByReturn,
		"DialDoneInfo":    smtprelay.DialDoneInfo{Err: e},
		"EnhancedCode":    reply.EnhancedCode,
		"Error":           e,
		"DialStartInfo":   smtprelay.DialStartInfo{},
		"LearnedInfo":     smtprelay.LearnedInfo{Reply: reply},
		"Lesson":          smtprelay.LessonChunks,
		"ReplyInfo":       smtprelay.ReplyInfo{Reply: reply},
		"RetryInfo":       smtprelay.RetryInfo{Message: numbered(0), Err: e},
		"SendDoneInfo":    smtprelay.SendDoneInfo{Message: numbered(0), Err: e},
		"SendStartInfo":   smtprelay.SendStartInfo{Message: numbered(0)},
		"GotConnInfo":     smtprelay.GotConnInfo{},
		"Limits":          cfg.Limits,
		"MailOptions":     smtprelay.MailOptions{},
		"Mechanism":       sasl.NewExternalClient(secretUser), // its maker is responsible for its content
		"Message":         numbered(0),
		"Op":              smtprelay.OpAuth,
		"Outcome":         smtprelay.Unknown,
		"Pipelining":      cfg.Pipelining,
		"RcptOptions":     smtprelay.RcptOptions{},
		"Receipt":         smtprelay.Receipt{Reply: reply},
		"RecipientResult": smtprelay.RecipientResult{Reply: reply},
		"Reply":           reply,
		"Result":          smtprelay.Result{Message: numbered(0), Err: e},
		"Retry":           cfg.Retry,
		"Scope":           smtprelay.ScopeRelay,
		"ServerInfo":      smtprelay.ServerInfo{Name: "relay.example.com", Mechanisms: []string{"PLAIN"}},
		"Slot":            smtprelay.Slot{},
		"Slots":           smtprelay.Slots(nil), // its maker is responsible for its content
		"Stats":           client.Stats(),
		"TLSMode":         cfg.TLS,
		"Timeouts":        cfg.Timeouts,
		"Trace":           cfg.Trace,
		"Failover":        smtprelay.NewFailover(client),
		"GoMail":          smtprelay.GoMail(nil), // its maker is responsible for its content
		"Registry":        registry,
	}
	for _, name := range exportedTypes(t) {
		if _, ok := values[name]; !ok {
			t.Errorf("type %s is exported: this test needs a value of it", name)
		}
	}
	values["&Config"] = &cfg
	values["a struct with a Config"] = struct{ Mail smtprelay.Config }{cfg}
	values["a struct with a Client that is not exported"] = struct{ mail *smtprelay.Client }{client}
	values["a slice of Configs"] = []smtprelay.Config{cfg}
	values["a map of *Configs"] = map[string]*smtprelay.Config{"mail": &cfg}
	for name, v := range values {
		if output := dump(v); len(leaksOf(output)) > 0 {
			t.Errorf("%s: %q in:\n%s", name, leaksOf(output), excerpt(output))
		}
	}
}

// exportedTypes returns the names of the package's exported types.
func exportedTypes(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("../*.go")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok || gen.Tok != token.TYPE {
				continue
			}
			for _, spec := range gen.Specs {
				if name := spec.(*ast.TypeSpec).Name.Name; ast.IsExported(name) {
					names = append(names, name)
				}
			}
		}
	}
	if len(names) < 10 {
		t.Fatalf("found only the types %v", names)
	}
	return names
}

// An invalid URL is the error that most likely carries a key into a log: url.Parse quotes its input.
func TestKeyIsInNoErrorOfParseURL(t *testing.T) {
	for _, text := range []string{
		"smtps://" + secretUser + ":" + secretKey + "@relay.example.com:465",              // a / and a % not escaped
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay:port",         // port no number
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@",                   // no host
		"imap://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay.example.com",   // other scheme
		"//" + secretUser + ":" + url.PathEscape(secretKey) + "@relay.example.com",        // no scheme
		secretUser + ":" + url.PathEscape(secretKey) + "@relay.example.com",               // no scheme
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay?max_conns=x",  // bad number
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay?no_such=1",    // unknown parameter
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay/path",         // a path
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay\x7f:465",      // control character
		"smtps://" + secretUser + ":" + url.PathEscape(secretKey) + "@relay?max_conns=%z", // broken escape
	} {
		cfg, err := smtprelay.ParseURL(text)
		if err == nil {
			t.Errorf("%q is parsed as %v", strings.ReplaceAll(text, secretKey, "KEY"), cfg)
			continue
		}
		t.Log(err)
		if output := dump(err) + dump(errors.Unwrap(err)); len(leaksOf(output)) > 0 {
			t.Errorf("%q in: %s", leaksOf(output), excerpt(output))
		}
	}
}
