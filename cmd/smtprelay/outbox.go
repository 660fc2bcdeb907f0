package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
)

// The exit statuses of outbox, beside exitUsage.
const (
	exitNotPossible = 1 // no such message, or not in this state
	exitStore       = 3 // the store is not there, or does not answer
)

const storeHelp = `The store is --store, else SMTPRELAY_OUTBOX in the environment:

    /var/lib/shop/outbox                        the folder of a sqlitestore
    nats://one:4222,nats://two:4222/NAME        the stream NAME of a natsstore; without /NAME it is "outbox"
    tls://one:4222/NAME?ca=FILE&creds=FILE      with TLS, and with credentials from a file; also cert=FILE&key=FILE

A password or a token in the URL is taken from SMTPRELAY_OUTBOX only, since other users see the command line of a process.
The store must be there: none is created.`

// storeFlags say which store it is.
type storeFlags struct {
	store   string
	timeout time.Duration
}

func newOutbox() *cobra.Command {
	var f storeFlags
	cmd := &cobra.Command{
		Use:   "outbox",
		Short: "Look after the messages that a service keeps in an outbox",
		Long: `Outbox shows the messages in the store of package outbox, and lets you decide about those that need a person: the unknown
ones, which the relay may have or not, and the dead ones, which it has refused. It sends nothing itself; the service's
worker does. It may run while workers do, as often as you like: each change is one transaction that names the state that it
expects, so that a message which a worker has begun to send is left alone. A folder must be on a disk of this machine: run
the command there, as the user whose folder it is.

` + storeHelp + `

Exit status: 0 done, 1 no such message or not possible in its state, 2 usage or settings, 3 the store was not reached, or page has no address.`,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&f.store, "store", "", "folder or `URL` of the store; without it SMTPRELAY_OUTBOX")
	cmd.PersistentFlags().DurationVar(&f.timeout, "timeout", time.Minute, "how long the store may take; 0 is no limit; watch and page take it for each count and each request")
	cmd.AddCommand(newOutboxList(&f), newOutboxShow(&f), newOutboxResolve(&f), newOutboxRequeue(&f), newOutboxCancel(&f), newOutboxWatch(&f), newOutboxStats(&f), newOutboxPage(&f))
	for _, sub := range cmd.Commands() {
		sub.Long += "\n\n" + storeHelp + "\n\nExit status: 0 done, 1 no such message or not possible in its state, 2 usage or settings, 3 the store was not reached."
	}
	return cmd
}

// with opens the store, has do use it, and closes it.
func (f *storeFlags) with(cmd *cobra.Command, do func(ctx context.Context, box *outbox.Outbox) error) error {
	open, err := f.read()
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	if f.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.timeout)
		defer cancel()
	}
	box, done, err := open()
	if err == nil {
		err = errors.Join(do(ctx, box), done())
	}
	if _, ok := errors.AsType[*exit](err); err == nil || ok {
		return err
	}
	return &exit{exitStore, fmt.Errorf("outbox: %w", err)}
}

// An opener opens a store. Errors of settings have been found before.
type opener func() (box *outbox.Outbox, done func() error, err error)

// read finds out which store it is.
func (f *storeFlags) read() (opener, error) {
	text, from := f.store, "--store"
	if text == "" {
		text, from = os.Getenv("SMTPRELAY_OUTBOX"), "SMTPRELAY_OUTBOX"
	}
	switch {
	case text == "":
		return nil, errors.New("no store is set: name its folder or its URL (nats://HOST:4222) with --store or in SMTPRELAY_OUTBOX")
	case strings.Contains(text, "://"):
		n, err := parseNATS(text, from == "--store")
		if err != nil {
			return nil, fmt.Errorf("the store's URL (%s) is wrong: %w", from, err)
		}
		return n.open, nil
	}
	return func() (*outbox.Outbox, func() error, error) {
		store, err := sqlitestore.OpenExisting(text)
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil, nil, fmt.Errorf("there is no store in %s: name the folder that the service opens with sqlitestore.Open", printable(text))
		case err != nil:
			return nil, nil, fmt.Errorf("%w; run this as the user whose folder it is, on the machine that has the disk", err)
		}
		return boxOf(store), store.Close, nil
	}, nil
}

// boxOf is an outbox for handling alone. It is never run, and so routes nothing.
func boxOf(store outbox.Store) *outbox.Outbox {
	box, err := outbox.New(outbox.Config{Store: store, Route: func(outbox.Item) *smtprelay.Client { return nil }})
	if err != nil {
		panic(err) // the configuration is a constant
	}
	return box
}

// natsPlace is where a natsstore is.
type natsPlace struct {
	servers, name string
	options       []nats.Option
}

// parseNATS reads the URL of a store, or several with commas between. Its errors do not quote it, since it may have a password.
// public: it has been on the command line, and may have none.
func parseNATS(text string, public bool) (n natsPlace, err error) {
	var servers []string
	parts := strings.Split(text, ",")
	for i, part := range parts {
		u, err := url.Parse(part)
		switch {
		case public && (err == nil && u.User != nil || err != nil && strings.Contains(part, "@")):
			return n, errors.New("it has a user, a password or a token, and other users of this machine see the command line: put the URL into SMTPRELAY_OUTBOX, or the credentials into a file (?creds=FILE)")
		case err != nil || u.Host == "":
			return n, errors.New("it cannot be parsed: want nats://HOST:4222/NAME")
		case u.Scheme != "nats" && u.Scheme != "tls":
			return n, fmt.Errorf("the scheme %q: want nats or tls, or the name of a folder", u.Scheme)
		}
		if i == len(parts)-1 {
			if n.name = strings.Trim(u.Path, "/"); n.name == "" {
				n.name = "outbox"
			}
			if err := n.files(u.Query()); err != nil {
				return n, err
			}
		} else if strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
			return n, errors.New("the name and the files are those of the last server, after all others")
		}
		servers = append(servers, (&url.URL{Scheme: u.Scheme, User: u.User, Host: u.Host}).String())
	}
	n.servers = strings.Join(servers, ",")
	return n, nil
}

// files reads the files that a URL names.
func (n *natsPlace) files(q url.Values) error {
	for key := range q {
		if !slices.Contains([]string{"creds", "ca", "cert", "key"}, key) {
			return fmt.Errorf("the parameter %q: want creds, ca, cert or key", key)
		}
		if _, err := os.Stat(q.Get(key)); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	if q.Has("creds") {
		n.options = append(n.options, nats.UserCredentials(q.Get("creds")))
	}
	if q.Has("ca") {
		n.options = append(n.options, nats.RootCAs(q.Get("ca")))
	}
	if q.Has("cert") != q.Has("key") {
		return errors.New("cert and key: both or none")
	}
	if q.Has("cert") {
		n.options = append(n.options, nats.ClientCert(q.Get("cert"), q.Get("key")))
	}
	return nil
}

func (n natsPlace) open() (*outbox.Outbox, func() error, error) {
	nc, err := natsstore.Connect(n.servers, append(n.options, nats.Name("smtprelay outbox"), nats.RetryOnFailedConnect(false))...)
	if err != nil {
		return nil, nil, fmt.Errorf("the NATS servers were not reached: %w; see that the address, TLS and the credentials are right and that a server runs", err)
	}
	store, err := natsstore.New(nc, natsstore.Options{Name: n.name, Existing: true})
	if err != nil {
		nc.Close()
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			err = fmt.Errorf("the servers have no stream %q: name that of the service (natsstore.Options.Name) after the address, as in nats://HOST:4222/NAME", n.name)
		}
		return nil, nil, err
	}
	return boxOf(store), func() error {
		defer nc.Close()
		return store.Close()
	}, nil
}

// List.

// The states in the order in which they are listed: those that a person is to see first.
var listedStates = []outbox.State{outbox.Unknown, outbox.Dead, outbox.Sending, outbox.Queued, outbox.Accepted, outbox.Cancelled}

func stateNames() (names []string) {
	for _, s := range listedStates {
		names = append(names, s.String())
	}
	return names
}

// filter says which messages are listed.
type filter struct {
	states     []string
	tenant, to string
	tenantOnly bool // tenant counts, though it may be ""
	after      string
	limit      int
}

// read returns the states to be listed, and the ID after which the list begins in the first of them.
func (f *filter) read() (states []outbox.State, afterID string, err error) {
	for _, name := range f.states {
		if !slices.Contains(stateNames(), name) {
			return nil, "", fmt.Errorf("--state %q: want %s", name, strings.Join(stateNames(), ", "))
		}
	}
	if f.limit < 0 {
		return nil, "", errors.New("--limit is negative: 0 is no limit")
	}
	for _, s := range listedStates {
		if slices.Contains(f.states, s.String()) {
			states = append(states, s)
		}
	}
	if f.after == "" {
		return states, "", nil
	}
	name, id, _ := strings.Cut(f.after, "/")
	i := slices.IndexFunc(states, func(s outbox.State) bool { return s.String() == name })
	if i < 0 || id == "" {
		return nil, "", fmt.Errorf("--after %q: want what the page before has said, such as queued/ID, and the same --state", f.after)
	}
	return states[i:], id, nil
}

func (f *filter) matches(i *outbox.Item) bool {
	if f.tenantOnly && i.Tenant != f.tenant {
		return false
	}
	is := func(to string) bool {
		if strings.HasPrefix(f.to, "@") {
			to = to[max(strings.LastIndexByte(to, '@'), 0):]
		}
		return strings.EqualFold(to, f.to)
	}
	return f.to == "" || slices.ContainsFunc(i.To, is) || slices.ContainsFunc(i.Fates, func(fate outbox.Fate) bool { return is(fate.To) })
}

// page calls show for the messages of a page. more says where the next one begins, "" if there is none.
func (f *filter) page(ctx context.Context, box *outbox.Outbox, show func(*outbox.Item) error) (more string, err error) {
	states, after, err := f.read()
	if err != nil {
		return "", &exit{exitUsage, err}
	}
	shown, last := 0, ""
	for _, state := range states {
		for i, err := range box.List(ctx, state) {
			switch {
			case err != nil:
				return "", err
			case after != "":
				if i.ID == after {
					after = ""
				}
				continue
			case !f.matches(&i):
				continue
			case f.limit > 0 && shown == f.limit:
				return last, nil
			}
			if err := show(&i); err != nil {
				return "", err
			}
			shown++
			last = state.String() + "/" + i.ID
		}
		if after != "" {
			return "", &exit{exitNotPossible, fmt.Errorf("outbox: message %q is not %v any more, so the next page cannot be found: list from the start", after, state)}
		}
	}
	return "", nil
}

func newOutboxList(store *storeFlags) *cobra.Command {
	var f filter
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List messages, oldest first in each state",
		Long: `List lists messages: the unknown ones first, then the dead, those being sent and the queued. Each state is listed oldest first.
Where there are more than --limit, the last line (on stderr) says how to go on.

    smtprelay outbox list --state dead --to @example.org
    smtprelay outbox list --state dead --json --limit 0 | jq -r .id | xargs -d '\n' -n 1 smtprelay outbox requeue --`,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.tenantOnly = cmd.Flags().Changed("tenant")
			if _, _, err := f.read(); err != nil {
				return err
			}
			return store.with(cmd, func(ctx context.Context, box *outbox.Outbox) error {
				table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				if !asJSON {
					fmt.Fprintln(table, "STATE\tID\tTENANT\tTO\tSINCE\tTRIES\tREASON")
				}
				more, err := f.page(ctx, box, func(i *outbox.Item) error {
					if asJSON {
						return printJSON(cmd.OutOrStdout(), itemOf(i))
					}
					_, err := fmt.Fprintf(table, "%v\t%s\t%s\t%s\t%s\t%d\t%s\n", i.State, printable(i.ID), printable(i.Tenant), printable(few(i.To)), ago(i.Changed), i.Attempts, printable(cut(i.Reason)))
					return err
				})
				if err := errors.Join(err, table.Flush()); err != nil {
					return err
				}
				if more != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "There are more: --after %s\n", quoted(more))
				}
				return nil
			})
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&f.states, "state", []string{"unknown", "dead", "sending", "queued"}, "`states`, with commas between: "+strings.Join(stateNames(), ", "))
	flags.StringVar(&f.tenant, "tenant", "", "messages of this `tenant` only; \"\" is those of none")
	flags.StringVar(&f.to, "to", "", "messages for this `address` only, or for a domain: @example.org")
	flags.IntVar(&f.limit, "limit", 50, "messages on a page; 0 is no limit")
	flags.StringVar(&f.after, "after", "", "the page after this `message`, as the page before has said")
	flags.BoolVar(&asJSON, "json", false, "one JSON object for each message")
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(stateNames(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// itemRecord is a message as JSON has it.
type itemRecord struct {
	ID           string                            `json:"id"`
	State        string                            `json:"state"`
	Tenant       string                            `json:"tenant"`
	Priority     int                               `json:"priority"`
	From         string                            `json:"from"`
	To           []string                          `json:"to"` // who is still to get it
	AllOrNothing bool                              `json:"all_or_nothing,omitempty"`
	MailOptions  *smtprelay.MailOptions            `json:"mail_options,omitempty"`
	RcptOptions  map[string]*smtprelay.RcptOptions `json:"rcpt_options,omitempty"`
	Created      time.Time                         `json:"created"`
	Changed      time.Time                         `json:"changed"`
	Due          time.Time                         `json:"due,omitzero"` // of what is queued
	NotBefore    time.Time                         `json:"not_before,omitzero"`
	NotAfter     time.Time                         `json:"not_after,omitzero"`
	Attempts     int                               `json:"attempts"`
	Reason       string                            `json:"reason,omitempty"`
	Recipients   []fateRecord                      `json:"recipients"` // that were tried
	Header       *string                           `json:"header,omitempty"`
}

type fateRecord struct {
	To      string `json:"to"`
	Outcome string `json:"outcome"`
	Code    int    `json:"code,omitempty"`
	Reply   string `json:"reply,omitempty"`
	QueueID string `json:"queue_id,omitempty"`
}

func itemOf(i *outbox.Item) itemRecord {
	r := itemRecord{ID: i.ID, State: i.State.String(), Tenant: i.Tenant, Priority: i.Priority, From: i.From, To: append([]string{}, i.To...), AllOrNothing: i.AllOrNothing,
		MailOptions: i.MailOptions, RcptOptions: i.RcptOptions, Created: i.Created.UTC(), Changed: i.Changed.UTC(), NotBefore: i.NotBefore.UTC(), NotAfter: i.NotAfter.UTC(),
		Attempts: i.Attempts, Reason: i.Reason, Recipients: []fateRecord{}}
	if i.State == outbox.Queued {
		r.Due = i.Due.UTC()
	}
	for _, f := range i.Fates {
		r.Recipients = append(r.Recipients, fateRecord{f.To, f.Outcome.String(), f.Code, f.Reply, f.QueueID})
	}
	return r
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// quoted is text as one word of a shell.
func quoted(text string) string { return "'" + strings.ReplaceAll(printable(text), "'", `'\''`) + "'" }

// few is the first of some addresses, and how many more there are.
func few(to []string) string {
	if len(to) > 1 {
		return fmt.Sprintf("%s +%d", to[0], len(to)-1)
	}
	return strings.Join(to, "")
}

// cut is the beginning of a text, for a line of a table.
func cut(text string) string {
	const most = 120
	if r := []rune(text); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return text
}

// ago is how long ago something was.
func ago(t time.Time) string { return time.Since(t).Truncate(time.Second).String() }

// Show.

func newOutboxShow(store *storeFlags) *cobra.Command {
	var withBody, asJSON bool
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show a message: its state, what the relay has said, its envelope and its header",
		Long: `Show shows one message: its state, what the relay has said for each recipient, its envelope and its header. Its body is shown with
--body only, which writes the whole message as it is sent, and nothing else.`,
		Args: takes(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if withBody && asJSON {
				return errors.New("--body and --json: one of them")
			}
			id := args[0]
			return store.with(cmd, func(ctx context.Context, box *outbox.Outbox) error {
				if withBody {
					return writeBody(ctx, box, id, cmd.OutOrStdout())
				}
				i, header, err := item(ctx, box, id)
				if err != nil {
					return err
				}
				if asJSON {
					r := itemOf(&i)
					r.Header = header
					return printJSON(cmd.OutOrStdout(), r)
				}
				return printItem(cmd.OutOrStdout(), &i, header)
			})
		},
	}
	cmd.Flags().BoolVar(&withBody, "body", false, "write the whole message, header and body, and nothing else")
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object")
	return cmd
}

// item returns a message, and its header: nil if that is gone, with the body.
func item(ctx context.Context, box *outbox.Outbox, id string) (i outbox.Item, header *string, err error) {
	if i, err = box.Status(ctx, id); err != nil {
		return i, nil, impossible(id, err)
	}
	body, err := box.Body(ctx, id)
	if errors.Is(err, outbox.ErrNotFound) {
		return i, nil, nil
	}
	if err != nil {
		return i, nil, err
	}
	var h headerWriter
	if _, err := body.WriteTo(&h); err != nil && !errors.Is(err, errHeaderEnds) {
		return i, nil, err
	}
	return i, new(string(h.text)), nil
}

// writeBody writes a message as it is sent.
func writeBody(ctx context.Context, box *outbox.Outbox, id string, w io.Writer) error {
	i, err := box.Status(ctx, id)
	if err != nil {
		return impossible(id, err)
	}
	body, err := box.Body(ctx, id)
	if errors.Is(err, outbox.ErrNotFound) {
		return &exit{exitNotPossible, fmt.Errorf("outbox: message %q has no body any more: it is %v", id, i.State)}
	}
	if err == nil {
		_, err = body.WriteTo(plain(w))
	}
	return err
}

func printItem(w io.Writer, i *outbox.Item, header *string) error {
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(table, "%s:\t%s\n", name, printable(value))
		}
	}
	at := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(time.RFC3339)
	}
	line("ID", i.ID)
	line("State", fmt.Sprintf("%v since %s (%s)", i.State, at(i.Changed), ago(i.Changed)))
	line("Reason", i.Reason)
	line("Attempts", fmt.Sprint(i.Attempts))
	if i.State == outbox.Queued {
		line("Due", at(i.Due))
	}
	line("Created", at(i.Created))
	line("Not before", at(i.NotBefore))
	line("Not after", at(i.NotAfter))
	line("Tenant", i.Tenant)
	line("Priority", fmt.Sprint(i.Priority))
	line("From", "<"+i.From+">")
	line("To", strings.Join(i.To, ", "))
	table.Flush()
	if len(i.Fates) > 0 {
		fmt.Fprint(&b, "\nWhat the relay has said:\n")
		for _, f := range i.Fates {
			fmt.Fprintf(table, "  %s\t%v\t%s\t%s\n", printable(f.To), f.Outcome, printable(f.Reply), printable(f.QueueID))
		}
		table.Flush()
	}
	if header == nil {
		fmt.Fprint(&b, "\nThe header is gone, with the body.\n")
	} else {
		fmt.Fprint(&b, "\nHeader:\n")
		for text := range strings.Lines(*header) {
			fmt.Fprintf(&b, "  %s\n", printable(strings.ReplaceAll(strings.TrimRight(text, "\r\n"), "\t", " ")))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// headerShown is how many octets of a header are shown.
const headerShown = 64 << 10

var errHeaderEnds = errors.New("the header ends")

// headerWriter takes the header of a message, and no more.
type headerWriter struct{ text []byte }

// Write implements io.Writer.
func (h *headerWriter) Write(p []byte) (int, error) {
	h.text = append(h.text, p...)
	for _, end := range []string{"\r\n\r\n", "\n\n"} {
		if i := strings.Index(string(h.text), end); i >= 0 {
			h.text = h.text[:i+len(end)/2]
			return len(p), errHeaderEnds
		}
	}
	if len(h.text) > headerShown {
		h.text = h.text[:headerShown]
		return len(p), errHeaderEnds
	}
	return len(p), nil
}

// plain is w, where that is a terminal without what could do something to it.
func plain(w io.Writer) io.Writer {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return plainWriter{w}
	}
	return w
}

type plainWriter struct{ to io.Writer }

// Write implements io.Writer.
func (w plainWriter) Write(p []byte) (int, error) {
	text := slices.Clone(p)
	for i, c := range text {
		if c < ' ' && c != '\n' && c != '\r' && c != '\t' || c >= 0x7f {
			text[i] = '?'
		}
	}
	_, err := w.to.Write(text)
	return len(p), err
}

// Deciding.

// impossible is the error of what cannot be done with a message.
func impossible(id string, err error) error {
	if errors.Is(err, outbox.ErrNotFound) {
		return &exit{exitNotPossible, fmt.Errorf("outbox: there is no message %q, or not any more: see \"smtprelay outbox list\" for the IDs; what has ended is forgotten after a while (Config.Remember)", id)}
	}
	return err
}

// What is possible instead.
const (
	useResolve = `"smtprelay outbox resolve ID sent|resend|drop"`
	useCancel  = `"smtprelay outbox cancel ID"`
	useRequeue = `"smtprelay outbox requeue ID"`
)

// A deed is what a person can decide about a message. do returns ErrConflict where the message's state does not allow it.
type deed struct {
	do      func(ctx context.Context, box *outbox.Outbox, id string) error
	then    outbox.State            // what the message is after it
	want    string                  // what it must be
	instead map[outbox.State]string // what is possible where it is not
}

var deeds = map[string]deed{
	"sent":    resolving(outbox.TakeAsSent, outbox.Accepted),
	"resend":  resolving(outbox.SendAgain, outbox.Queued),
	"drop":    resolving(outbox.Drop, outbox.Cancelled),
	"requeue": {requeue, outbox.Queued, "dead", map[outbox.State]string{outbox.Unknown: useResolve}},
	"cancel":  {cancel, outbox.Cancelled, "queued", map[outbox.State]string{outbox.Unknown: useResolve, outbox.Dead: useResolve + " or " + useRequeue}},
}

func resolving(v outbox.Verdict, then outbox.State) deed {
	return deed{func(ctx context.Context, box *outbox.Outbox, id string) error { return box.Resolve(ctx, id, v) }, then, "unknown or dead", map[outbox.State]string{outbox.Queued: useCancel}}
}

func requeue(ctx context.Context, box *outbox.Outbox, id string) error { return box.Requeue(ctx, id) }

func cancel(ctx context.Context, box *outbox.Outbox, id string) error {
	cancelled, err := box.Cancel(ctx, id)
	if err == nil && !cancelled {
		err = outbox.ErrConflict
	}
	return err
}

// decide does a deed, and returns the state of the message after it.
func decide(ctx context.Context, box *outbox.Outbox, id string, d deed) (outbox.State, error) {
	err := d.do(ctx, box, id)
	if !errors.Is(err, outbox.ErrConflict) {
		return d.then, impossible(id, err)
	}
	i, err := box.Status(ctx, id)
	if err != nil {
		return 0, impossible(id, err)
	}
	what := d.instead[i.State]
	switch {
	case what != "":
		what = "; use " + what
	case i.State == outbox.Sending:
		what = "; wait for its end"
	}
	return i.State, &exit{exitNotPossible, fmt.Errorf("outbox: message %q is %v, want %s%s", id, i.State, d.want, what)}
}

// decide does a deed, and says what the message is after it.
func (f *storeFlags) decide(cmd *cobra.Command, id string, d deed) error {
	return f.with(cmd, func(ctx context.Context, box *outbox.Outbox) error {
		state, err := decide(ctx, box, id, d)
		if err == nil {
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %v\n", printable(id), state)
		}
		return err
	})
}

func newOutboxResolve(store *storeFlags) *cobra.Command {
	verdicts := []string{"sent", "resend", "drop"}
	return &cobra.Command{
		Use:   "resolve ID sent|resend|drop",
		Short: "Decide about a message that is unknown or dead",
		Long: `Resolve decides about a message that is unknown or dead. For an unknown one ask the relay's log first, by its recipient and time.

    sent      the relay has it: it counts as accepted
    resend    it is sent again, to all who have not certainly got it; if it is unknown they may get it twice
    drop      it is not sent again: it is cancelled`,
		Args: takes(2),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return verdicts, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(verdicts, args[1]) {
				return fmt.Errorf("the verdict %q: want sent, resend or drop", args[1])
			}
			return store.decide(cmd, args[0], deeds[args[1]])
		},
	}
}

func newOutboxRequeue(store *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "requeue ID",
		Short: "Send a dead message again",
		Long: `Requeue sends a message that is dead again, to those who have not got it: what the relay has refused is mended. An unknown one is left
alone, since the relay may have it.`,
		Args: takes(1),
		RunE: func(cmd *cobra.Command, args []string) error { return store.decide(cmd, args[0], deeds["requeue"]) },
	}
}

func newOutboxCancel(store *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Keep a queued message from being sent",
		Long: `Cancel keeps a message that is queued from being sent. Once a worker has begun to send its end it is too late. With exit status 0 it is
certain that the message is not sent.`,
		Args: takes(1),
		RunE: func(cmd *cobra.Command, args []string) error { return store.decide(cmd, args[0], deeds["cancel"]) },
	}
}

// Counting.

// counts are how many messages are in which state, as JSON has it.
type counts struct {
	Time    time.Time `json:"time"`
	Queued  int       `json:"queued"`
	Sending int       `json:"sending"`
	Unknown int       `json:"unknown"`
	Dead    int       `json:"dead"`
	Oldest  float64   `json:"oldest_seconds"` // for how long that has been due which was enqueued first; 0: nothing is due
}

func count(ctx context.Context, box *outbox.Outbox) (counts, error) {
	s, err := box.Stats(ctx)
	c := counts{time.Now().UTC(), s.Stored.Queued, s.Stored.Sending, s.Stored.Unknown, s.Stored.Dead, 0}
	if !s.Stored.Oldest.IsZero() {
		c.Oldest = max(c.Time.Sub(s.Stored.Oldest).Seconds(), 0)
	}
	return c, err
}

// due says for people how long the oldest message has been due.
func (c *counts) due() string {
	if c.Oldest == 0 {
		return "nothing is due"
	}
	return "oldest due for " + time.Duration(c.Oldest*float64(time.Second)).Truncate(time.Second).String()
}

func newOutboxStats(store *storeFlags) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Count the messages in each state",
		Long: `Stats counts the messages that are queued, being sent, unknown and dead, and says for how long the oldest has been due: some
seconds where all is well.`,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return store.with(cmd, func(ctx context.Context, box *outbox.Outbox) error {
				c, err := count(ctx, box)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), c)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "queued   %d\nsending  %d\nunknown  %d\ndead     %d\n%s\n", c.Queued, c.Sending, c.Unknown, c.Dead, c.due())
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object")
	return cmd
}

func newOutboxWatch(store *storeFlags) *cobra.Command {
	var asJSON bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Count the messages in each state once a second, until Ctrl-C",
		Long: `Watch writes a line with what stats counts once a second, until Ctrl-C. Where millions are stored a count takes a while: use a longer
--every.`,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every <= 0 {
				return errors.New("--every: want a time such as 1s")
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			cmd.SetContext(ctx)
			each := *store
			each.timeout = 0
			err := each.with(cmd, func(ctx context.Context, box *outbox.Outbox) error {
				ticker := time.NewTicker(every)
				defer ticker.Stop()
				for {
					c, err := countWithin(ctx, box, store.timeout)
					if err == nil && asJSON {
						err = printJSON(cmd.OutOrStdout(), c)
					} else if err == nil {
						_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s  queued %d  sending %d  unknown %d  dead %d  %s\n", c.Time.Local().Format(time.TimeOnly), c.Queued, c.Sending, c.Unknown, c.Dead, c.due())
					}
					if err != nil {
						return err
					}
					select {
					case <-ticker.C:
					case <-ctx.Done():
						return nil
					}
				}
			})
			if ctx.Err() != nil {
				return nil // it was told to end
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object for each count")
	cmd.Flags().DurationVar(&every, "every", time.Second, "how often")
	return cmd
}

// countWithin is count, with a limit to its time unless that is 0.
func countWithin(ctx context.Context, box *outbox.Outbox, limit time.Duration) (counts, error) {
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	return count(ctx, box)
}
