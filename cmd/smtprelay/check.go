package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/smtprelay/smtprelay"
)

// The exit statuses of check, beside exitUsage: where it has failed.
const (
	exitReach   = 3
	exitTLS     = 4
	exitAuth    = 5
	exitRefused = 6
)

// A report is all that check finds out. It is what --json prints.
type report struct {
	Relay     string          `json:"relay"`     // host:port
	TLS       string          `json:"tls"`       // what the setting wants
	User      string          `json:"user"`      // "" without AUTH
	From      string          `json:"from"`      // where the setting was found
	Resolve   step            `json:"resolve"`   // of the host's name
	Addresses []addressReport `json:"addresses"` // one for each address
	Envelope  *step           `json:"envelope,omitempty"`
	Allows    []string        `json:"allows,omitempty"`   // what the relay allows, and what the library makes of it
	Warnings  []string        `json:"warnings,omitempty"` // what works and will not for long, or not at each address
	Problem   *problem        `json:"problem,omitempty"`  // the first; nil means that all is well
	Exit      int             `json:"exit"`
}

// An addressReport tells of one address of the relay.
type addressReport struct {
	Address string `json:"address"`
	Steps   []step `json:"steps"`
}

// A step of a dialogue.
type step struct {
	Name   string  `json:"name"`
	OK     bool    `json:"ok"`
	Text   string  `json:"text"`
	Millis float64 `json:"ms,omitempty"`
}

func newCheck() *cobra.Command {
	var (
		relay    relayFlags
		from, to string
		asJSON   bool
		send     bool
		limit    time.Duration
	)
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Tell whether mail can be sent through the relay and, if not, what to change",
		Long: `Check resolves the relay's name, connects to each of its addresses, looks at the certificate, asks what the relay
allows, and logs in. With --from and --to it asks whether the relay would take a mail for that envelope, and gives up before
the content, so that nothing is sent; with --send it sends a short one.

Exit status: 0 all is well, 2 usage or settings, 3 the relay was not reached or hung up, 4 TLS, 5 login, 6 sender or recipient
refused.

` + relayHelp,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (from == "") != (to == "") || send && to == "" {
				return errors.New("--from and --to belong together, and --send needs them")
			}
			for flag, address := range map[string]*string{"--from": &from, "--to": &to} {
				if err := oneAddress(flag, address); err != nil {
					return err
				}
			}
			r := new(report)
			if s, err := relay.read(true); err == nil {
				ctx, cancel := context.WithTimeout(cmd.Context(), limit)
				defer cancel()
				r = check(ctx, s, from, to, send)
			} else if asJSON {
				r.Resolve = step{Name: "settings", Text: err.Error()}
				r.fail(exitUsage, &problem{Step: "settings", What: err.Error(), Change: "Set the relay as smtprelay check --help says."})
			} else {
				return err
			}
			var err error
			if asJSON {
				out := json.NewEncoder(cmd.OutOrStdout())
				out.SetIndent("", "  ")
				out.SetEscapeHTML(false)
				err = out.Encode(r)
			} else {
				r.print(cmd.OutOrStdout())
			}
			if err == nil && r.Exit != 0 {
				err = &exit{code: r.Exit}
			}
			return err
		},
	}
	relay.add(cmd)
	cmd.Flags().StringVar(&from, "from", "", "sender to ask for")
	cmd.Flags().StringVar(&to, "to", "", "recipient to ask for")
	cmd.Flags().BoolVar(&send, "send", false, "send a short mail to --to")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print everything as JSON")
	cmd.Flags().DurationVar(&limit, "timeout", time.Minute, "time limit of the whole check")
	return cmd
}

// check asks the relay of s.
func check(ctx context.Context, s setting, from, to string, send bool) *report {
	cfg := s.cfg
	cfg.Addr = cmp.Or(cfg.Addr, "smtp.sendgrid.net:587")
	host, port, err := net.SplitHostPort(cfg.Addr)
	r := &report{Relay: cfg.Addr, TLS: tlsWords(cfg), User: cfg.Username, From: s.from}
	if _, configErr := smtprelay.New(cfg); err != nil || configErr != nil {
		r.Resolve = step{Name: "settings", Text: oneOf(err, configErr).Error()}
		r.fail(exitUsage, &problem{Step: "settings", What: "The settings are wrong: " + r.Resolve.Text + ".", Change: "Change the relay's URL (" + s.from + ")."})
		return r
	}
	began := time.Now()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	r.Resolve = step{Name: "resolve", OK: err == nil}
	if _, isAddr := netip.ParseAddr(host); isAddr != nil {
		r.Resolve.Millis = millis(time.Since(began))
	}
	if err != nil {
		r.Resolve.Text = err.Error()
		r.fail(exitReach, resolveProblem(host, err))
		return r
	}
	var texts []string
	for i, a := range addrs {
		addrs[i] = a.Unmap()
		texts = append(texts, addrs[i].String())
	}
	if r.Resolve.Text = host + " is " + strings.Join(texts, ", "); r.Resolve.Millis == 0 {
		r.Resolve.Text = host + " is an address"
	}

	// Each address is asked without a login, and then the first that works with it: a wrong password is tried once only, since
	// some relays lock the account.
	good := netip.Addr{}
	var failed *probe
	for _, a := range addrs {
		p := newProbe(cfg, netip.AddrPortFrom(a, portNumber(port)).String())
		p.login = !good.IsValid()
		p.run(ctx)
		r.Addresses = append(r.Addresses, p.report)
		switch {
		case p.err == nil && !good.IsValid():
			good = a
			r.Allows = p.allows(ctx)
			r.Warnings = append(r.Warnings, p.expiry()...)
			if p.state == nil && !a.IsLoopback() {
				r.Warnings = append(r.Warnings, "There is no TLS: mail, and the password if there is one, can be read on the way.")
			}
			if to != "" {
				r.Envelope = p.envelope(ctx, from, to, send)
			}
			if r.Envelope != nil && !r.Envelope.OK {
				r.fail(p.exit(), p.problem())
			}
		case p.err != nil && failed == nil:
			failed = p
		}
		if e, ok := errors.AsType[*smtprelay.Error](p.err); ok && e.Op == smtprelay.OpAuth {
			break
		}
	}
	switch {
	case failed == nil:
	case good.IsValid():
		r.Warnings = append(r.Warnings, fmt.Sprintf("The address %s does not work: %v. Others do, and are used.", failed.report.Address, failed.err))
	default:
		r.fail(failed.exit(), failed.problem())
	}
	return r
}

func (r *report) fail(code int, p *problem) {
	if r.Exit == 0 {
		r.Exit, r.Problem = code, p
	}
}

func oneOf(errs ...error) error {
	for _, err := range errs {
		if e, ok := errors.AsType[*smtprelay.Error](err); ok && e.Err != nil {
			return errors.New(strings.ReplaceAll(e.Err.Error(), "\n", "; "))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func portNumber(port string) uint16 {
	n, _ := strconv.ParseUint(port, 10, 16) // New has checked it
	return uint16(n)
}

// millis is d in milliseconds, for people: never 0, which means that nothing was measured.
func millis(d time.Duration) float64 {
	return max(float64(d.Round(10*time.Microsecond).Microseconds())/1000, 0.01)
}

const tlsImplicit = "TLS from the first byte"

// tlsWords says which TLS the Client of cfg wants.
func tlsWords(cfg smtprelay.Config) string {
	host, port, _ := net.SplitHostPort(cfg.Addr)
	ip, _ := netip.ParseAddr(host)
	switch {
	case cfg.TLS == smtprelay.TLSImplicit, cfg.TLS != smtprelay.TLSNone && (port == "465" || port == "2465"):
		return tlsImplicit
	case cfg.TLS == smtprelay.TLSNone:
		return "no TLS"
	case cfg.TLS == smtprelay.TLSOpportunistic, cfg.TLS == smtprelay.TLSByPort && (host == "localhost" || ip.IsLoopback()):
		return "STARTTLS if it is offered"
	}
	return "STARTTLS"
}

// A probe talks to one address of the relay by a Client of its own, and notes what it hears.
type probe struct {
	cfg   smtprelay.Config
	login bool // with the credentials
	err   error
	plain bool // the URL says TLS from the first byte, and the relay greets in the clear
	tls   bool // the other way round

	mu     sync.Mutex // guards the fields below
	report addressReport
	sent   time.Time            // of the last command
	rtt    time.Duration        // the shortest time from a command to its reply; 0: none yet
	chain  []*x509.Certificate  // the relay's, its own first
	ehlo   []string             // the lines of the last reply to EHLO
	state  *tls.ConnectionState // of the last handshake

	asked   bool // the question about refused chunks, which Config.Chunking has the library ask
	unsound bool // the answer to it
}

func newProbe(cfg smtprelay.Config, addr string) *probe {
	p := &probe{cfg: cfg, report: addressReport{Address: addr}}
	c := &p.cfg
	host, _, _ := net.SplitHostPort(cfg.Addr)
	c.Limits.MaxConns, c.Retry.MaxAttempts = 1, 1
	c.Timeouts.Dial = cmp.Or(c.Timeouts.Dial, 10*time.Second)
	c.Timeouts.Greeting = cmp.Or(c.Timeouts.Greeting, 15*time.Second)
	c.Timeouts.Quit = cmp.Or(c.Timeouts.Quit, time.Second)
	c.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		began := time.Now()
		nc, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			p.note(step{Name: "connect", OK: true, Millis: millis(time.Since(began))})
		}
		return nc, err
	}
	c.TLSConfig = cmp.Or(cfg.TLSConfig, &tls.Config{}).Clone()
	name := cmp.Or(c.TLSConfig.ServerName, host)
	roots := c.TLSConfig.RootCAs
	// Verified here, as crypto/tls would, so that a certificate that does not pass can be shown.
	c.TLSConfig.InsecureSkipVerify = true
	c.TLSConfig.VerifyConnection = func(cs tls.ConnectionState) error {
		p.mu.Lock()
		p.chain, p.state = cs.PeerCertificates, &cs
		p.mu.Unlock()
		opts := x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: x509.NewCertPool()}
		for _, cert := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		if _, err := cs.PeerCertificates[0].Verify(opts); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
		}
		return nil
	}
	c.Trace = &smtprelay.Trace{
		Command: func(_ context.Context, i smtprelay.CommandInfo) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.sent = time.Now()
			p.asked = p.asked || strings.HasPrefix(i.Line, "BDAT ")
		},
		Reply: func(_ context.Context, i smtprelay.ReplyInfo) { p.heard(i) },
		Learned: func(_ context.Context, i smtprelay.LearnedInfo) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.unsound = p.unsound || i.Lesson == smtprelay.LessonNoChunks
		},
	}
	return p
}

func (p *probe) note(s step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.report.Steps = append(p.report.Steps, s)
}

// heard notes a reply on the way to a ready connection.
func (p *probe) heard(i smtprelay.ReplyInfo) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if took := time.Since(p.sent); !p.sent.IsZero() && i.Op == smtprelay.OpEHLO && (p.rtt == 0 || took < p.rtt) {
		p.rtt = took
	}
	ok := i.Reply.Code < 400
	s := step{Name: i.Op.Text(), OK: ok, Text: i.Reply.String()}
	switch i.Op {
	case smtprelay.OpEHLO:
		p.noteTLSLocked()
		if ok {
			lines := strings.Split(i.Reply.Message, "\n")[1:]
			p.ehlo = lines
			s.Text = printable(cmp.Or(strings.Join(lines, ", "), "no extensions"))
		}
	case smtprelay.OpGreeting:
		p.noteTLSLocked()
	case smtprelay.OpSTARTTLS:
	case smtprelay.OpAuth:
		if i.Reply.Code == 334 {
			return // a challenge
		}
		s.Text = fmt.Sprintf("as %q: %s", p.cfg.Username, i.Reply.String())
	default:
		return
	}
	p.report.Steps = append(p.report.Steps, s)
}

// noteTLSLocked notes a handshake that went well, once.
func (p *probe) noteTLSLocked() {
	if p.state == nil || slices.ContainsFunc(p.report.Steps, func(s step) bool { return s.Name == "TLS" }) {
		return
	}
	p.report.Steps = append(p.report.Steps, step{Name: "TLS", OK: true, Text: tls.VersionName(p.state.Version) + "; " + chainWords(p.chain)})
}

// printable is text without control characters, which a relay could use to write over the terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
}

// chainWords describes a certificate and who has issued it.
func chainWords(chain []*x509.Certificate) string {
	if len(chain) == 0 {
		return "no certificate"
	}
	cert := chain[0]
	names := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	const most = 6
	if n := len(names); n > most {
		names = append(names[:most:most], fmt.Sprintf("and %d more", n-most))
	}
	text := "certificate for " + cmp.Or(strings.Join(names, ", "), "no name")
	issuer := "issued by " + cert.Issuer.String()
	if cert.Issuer.String() == cert.Subject.String() {
		issuer = "self-signed"
	}
	text += "; " + issuer
	if len(chain) > 1 {
		text += fmt.Sprintf(" (a chain of %d)", len(chain))
	}
	return printable(text + "; valid until " + cert.NotAfter.UTC().Format("2006-01-02 15:04 MST"))
}

// run opens a connection and logs in, if the probe is to.
func (p *probe) run(ctx context.Context) {
	cfg := p.cfg
	if !p.login {
		cfg.Username, cfg.Password = "", ""
	}
	var err error
	client, err := smtprelay.New(cfg)
	if err == nil {
		err = client.Ping(ctx)
		client.Close()
	}
	p.err = err
	e, ok := errors.AsType[*smtprelay.Error](err)
	if err == nil || !ok {
		p.note(step{Name: "round trip", OK: true, Millis: millis(p.rtt)})
		return
	}
	// A relay that is spoken to before it has greeted answers a TLS handshake with its greeting or with a refusal.
	_, isHeader := errors.AsType[tls.RecordHeaderError](e.Err)
	if tlsWords(p.cfg) == tlsImplicit && (isHeader || e.Op == smtprelay.OpGreeting) {
		p.plain = p.greets()
	} else if e.Op == smtprelay.OpGreeting && e.Reply.Code == 0 {
		p.tls = p.speaksTLS(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.plain {
		p.report.Steps = append(p.report.Steps, step{Name: "TLS", Text: "the relay greets in the clear"})
		return
	}
	if n := len(p.report.Steps); n > 0 && !p.report.Steps[n-1].OK && e.Reply.Code != 0 {
		return // the reply has been noted
	}
	s := step{Name: e.Op.Text(), Text: e.Reply.String()}
	switch {
	case e.Op == smtprelay.OpDial:
		s.Name = "connect"
	case e.Op == smtprelay.OpTLS:
		s.Name = "TLS"
	}
	if e.Reply.Code == 0 && e.Err != nil {
		s.Text = shortCause(e)
	}
	if e.Op == smtprelay.OpTLS && len(p.chain) > 0 {
		s.Text = chainWords(p.chain)
	}
	p.report.Steps = append(p.report.Steps, s)
}

// oneAddress makes the value of a flag, which may be "Ann <ann@example.org>", the address alone.
func oneAddress(flag string, value *string) error {
	if *value == "" {
		return nil
	}
	list, err := smtprelay.ParseAddresses(*value)
	if err != nil {
		return fmt.Errorf("%s: %w", flag, oneOf(err))
	}
	if len(list) != 1 {
		return fmt.Errorf("%s: want one address", flag)
	}
	*value = list[0]
	return nil
}

// expiry warns of a certificate that expires soon.
func (p *probe) expiry() []string {
	if len(p.chain) == 0 {
		return nil
	}
	if left := time.Until(p.chain[0].NotAfter); left < 14*24*time.Hour {
		when := fmt.Sprintf("in %d days", int(left.Hours()/24))
		if left < 48*time.Hour {
			when = "on " + p.chain[0].NotAfter.UTC().Format(time.RFC1123)
		}
		return []string{"The relay's certificate expires " + when + ": ask its operator whether it is renewed."}
	}
	return nil
}

// envelope asks whether the relay would take a mail.
func (p *probe) envelope(ctx context.Context, from, to string, send bool) *step {
	client, err := smtprelay.New(p.cfg)
	if err != nil {
		return &step{Name: "envelope", Text: err.Error()}
	}
	defer client.Close()
	body := &testMail{from: from, to: to, send: send}
	_, err = client.Send(ctx, smtprelay.Message{From: from, To: []string{to}, Body: body})
	switch {
	case err == nil:
		return &step{Name: "test mail", OK: true, Text: "from " + from + " to " + to + ": accepted"}
	case errors.Is(err, errEnough):
		return &step{Name: "envelope", OK: true, Text: "from " + from + " to " + to + ": the relay would take a mail; none was sent"}
	}
	p.err = err
	text := err.Error()
	if e, ok := errors.AsType[*smtprelay.Error](err); ok && e.Reply.Code != 0 {
		text = fmt.Sprintf("%s: %s", e.Op.Text(), e.Reply)
	}
	return &step{Name: "envelope", Text: "from " + from + " to " + to + ": " + text}
}

// errEnough ends a message before its first octet. The relay takes nothing of it: the connection ends without a final dot.
var errEnough = errors.New("nothing is sent")

type testMail struct {
	from, to string
	send     bool
}

func (m *testMail) WriteTo(w io.Writer) (int64, error) {
	if !m.send {
		return 0, errEnough
	}
	n, err := fmt.Fprintf(w, "From: <%s>\r\nTo: <%s>\r\nDate: %s\r\nMessage-ID: %s\r\nSubject: smtprelay check\r\n\r\nThe relay takes mail.\r\n",
		m.from, m.to, time.Now().Format(time.RFC1123Z), newMessageID(m.from))
	return int64(n), err
}

// allows tells what the relay allows and what the library makes of it.
func (p *probe) allows(ctx context.Context) []string {
	args := func(keyword string) string {
		for _, line := range p.ehlo {
			if word, args, _ := strings.Cut(line, " "); strings.EqualFold(word, keyword) {
				return printable(args)
			}
		}
		return ""
	}
	var list []string
	if size, err := strconv.ParseInt(args("SIZE"), 10, 64); err == nil && size > 0 {
		list = append(list, fmt.Sprintf("messages of up to %.1f MB; longer ones are not sent", float64(size)/1e6))
	} else {
		list = append(list, "no limit of size is announced")
	}
	if p.offers("PIPELINING") {
		list = append(list, "PIPELINING: one round trip for each message on a busy connection; messages stop overlapping by themselves if the relay cannot do it")
	} else {
		list = append(list, "no PIPELINING: each command waits for the reply to the one before, some four round trips for each message")
	}
	if p.offers("CHUNKING") {
		list = append(list, "CHUNKING: "+p.chunking(ctx))
	}
	if p.offers("LIMITS") {
		list = append(list, "LIMITS "+args("LIMITS")+": the library keeps to them")
	}
	for _, e := range []struct{ keyword, yes, no string }{
		{"8BITMIME", "8-bit text as it is", "no 8BITMIME: 8-bit text should be encoded"},
		{"SMTPUTF8", "addresses with letters beyond ASCII", "no SMTPUTF8: addresses of ASCII letters only"},
		{"DSN", "delivery reports on demand", ""},
		{"REQUIRETLS", "TLS required on the whole way", ""},
	} {
		if text := map[bool]string{true: e.yes, false: e.no}[p.offers(e.keyword)]; text != "" {
			if p.offers(e.keyword) {
				text = e.keyword + ": " + text
			}
			list = append(list, text)
		}
	}
	return list
}

// offers reports whether the relay has offered an extension in its last reply to EHLO.
func (p *probe) offers(keyword string) bool {
	return slices.ContainsFunc(p.ehlo, func(line string) bool {
		word, _, _ := strings.Cut(line, " ")
		return strings.EqualFold(word, keyword)
	})
}

// chunking finds out whether bodies may go in chunks.
func (p *probe) chunking(ctx context.Context) string {
	q := newProbe(p.cfg, p.report.Address)
	q.cfg.Chunking = true
	client, err := smtprelay.New(q.cfg)
	if err != nil {
		return "offered"
	}
	err = client.Ping(ctx)
	client.Close() // by then lessons have been told
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.unsound:
		return "not safe here: the relay does not discard a chunk that it refuses; bodies go by DATA, even with ?chunking=on"
	case err != nil:
		return "offered, but the test whether it is safe failed; leave it off"
	case q.asked:
		return "safe here: the relay discards a chunk that it refuses; ?chunking=on saves a round trip where connections are not busy"
	}
	return "offered"
}

func (r *report) print(w io.Writer) {
	user := ""
	if r.User != "" {
		user = fmt.Sprintf(", as %q", r.User)
	}
	fmt.Fprintf(w, "Relay %s, %s%s (from %s)\n\n", r.Relay, r.TLS, user, r.From)
	line := func(s step) {
		mark := "ok  "
		if !s.OK {
			mark = "FAIL"
		}
		took := ""
		if s.Millis > 0 {
			took = fmt.Sprintf("%g ms", s.Millis)
			if s.Text != "" {
				took = " (" + took + ")"
			}
		}
		fmt.Fprintf(w, "  %s  %-13s %s%s\n", mark, s.Name, s.Text, took)
	}
	line(r.Resolve)
	for _, a := range r.Addresses {
		fmt.Fprintf(w, "\n%s\n", a.Address)
		for _, s := range a.Steps {
			line(s)
		}
	}
	if r.Envelope != nil {
		fmt.Fprintln(w)
		line(*r.Envelope)
	}
	list := func(title string, lines []string) {
		if len(lines) > 0 {
			fmt.Fprintf(w, "\n%s\n", title)
			for _, l := range lines {
				fmt.Fprintf(w, "  - %s\n", l)
			}
		}
	}
	list("What the relay allows", r.Allows)
	list("Warnings", r.Warnings)
	switch {
	case r.Problem == nil && r.Envelope == nil:
		fmt.Fprintln(w, "\nAll is well so far. To ask for a sender and a recipient too, add --from and --to.")
		return
	case r.Problem == nil:
		fmt.Fprintln(w, "\nAll is well: mail can be sent.")
		return
	}
	fmt.Fprintf(w, "\nWhat is wrong\n  %s\n\nWhat to change\n", r.Problem.What)
	for _, l := range strings.Split(r.Problem.Change, "\n") {
		fmt.Fprintf(w, "  %s\n", l)
	}
}
