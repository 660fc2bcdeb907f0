package main

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"
)

// A relay is a server that the suite can install and run.
type relay struct {
	name string
	recipe
	command []string
	users   []string                           // system users that it runs as, each with a group of its name
	folders []folder                           // created before it starts
	prepare func(r *running) error             // other preparations in its root; optional
	queued  func(root string) ([]entry, error) // its ledger
	log     string                             // where it logs, in its root; "" means its output
	session func(p process) bool               // selects the processes that serve one session each; nil if one serves all

	onlyChecks []string // the names of the checks that make sense for it; nil means all

	// Known deviations.
	brokenTLS  bool   // offers TLS, but fails every handshake
	noOverlap  bool   // answers 503 to commands that arrived together with a final dot
	countsLate bool   // still counts a connection as open for a moment after the client has seen it close
	busyCode   string // in its temporary refusal of a recipient
	noMaxConns string // why it has no limit of connections, or of messages on one, or no idle limit short enough to reach
	noMaxMails string
	noIdle     string
}

type folder struct {
	path, owner, group string
	mode               fs.FileMode
}

// limits are enforced by every relay here, small enough to be reached.
var limits = struct {
	MaxConns, MaxMessages, MaxRecipients, MaxSize, IdleSeconds int
}{MaxConns: 4, MaxMessages: 15, MaxRecipients: 10, MaxSize: 200 << 10, IdleSeconds: 3}

const (
	user     = "apikey"
	password = "SG.correct-horse"
)

// settings fills in the configuration files.
type settings struct {
	Plain, StartTLS, Implicit                                  int // ports
	MaxConns, MaxMessages, MaxRecipients, MaxSize, IdleSeconds int
	User, Password, Cert, Key, Record                          string
}

//go:embed all:conf
var conf embed.FS

var relays = []relay{
	{
		name:     "postfix",
		busyCode: "450",
		recipe:   recipe{debs: []string{"postfix", "sasl2-bin", "libsasl2-modules", "libsasl2-modules-db"}},
		command:  []string{"/usr/sbin/postfix", "start-fg"},
		users:    []string{"postfix", "postdrop"},
		folders:  []folder{{"var/lib/postfix", "postfix", "postfix", 0o755}, {"var/spool/postfix", "root", "root", 0o755}},
		prepare:  preparePostfix,
		queued:   postfixQueue,
		log:      "/var/log/postfix.log",
		session:  func(p process) bool { return p.name == "smtpd" },

		noMaxMails: "Postfix limits messages per minute, not per connection",
	},
	{
		name:       "exim",
		busyCode:   "451",
		countsLate: true,
		recipe:     recipe{debs: []string{"exim4-daemon-light"}},
		command:    []string{"/usr/sbin/exim4", "-C", "/etc/exim4/exim4.conf", "-bdf"},
		users:      []string{"Debian-exim"},
		folders: []folder{
			{"var/spool/exim4", "Debian-exim", "Debian-exim", 0o750}, {"var/log/exim4", "Debian-exim", "Debian-exim", 0o750},
			{"run/exim4", "Debian-exim", "Debian-exim", 0o755},
		},
		queued:  eximQueue,
		log:     "/var/log/exim4/mainlog",
		session: func(p process) bool { return p.name == "exim4" && !p.first },
	},
	{
		name:     "opensmtpd",
		busyCode: "450",
		recipe:   recipe{debs: []string{"opensmtpd"}},
		command:  []string{"/usr/sbin/smtpd", "-d", "-P", "mta", "-P", "mda"},
		users:    []string{"opensmtpd", "opensmtpq"},
		folders: []folder{
			{"var/spool/smtpd", "root", "root", 0o711}, {"var/spool/smtpd/offline", "root", "opensmtpq", 0o770},
			{"var/spool/smtpd/purge", "opensmtpq", "root", 0o700}, {"var/spool/smtpd/queue", "opensmtpq", "root", 0o700},
			{"var/lib/opensmtpd", "root", "root", 0o755}, {"var/lib/opensmtpd/empty", "root", "root", 0o755},
		},
		queued: opensmtpdQueue,

		brokenTLS:  true,
		noMaxConns: "OpenSMTPD limits file descriptors, not connections",
		noIdle:     "OpenSMTPD's idle time is fixed at 5 minutes",
	},
	{
		name:      "haraka",
		busyCode:  "450",
		noOverlap: true,
		recipe: recipe{npm: []npmPackage{
			{name: "Haraka", version: "3.3.4", versionNode18: "3.1.1", newestNeedNode: 20},
		}},
		command: []string{"node", modulesInRoot + "/node_modules/Haraka/bin/haraka", "-c", "/etc/haraka"},
		queued:  recorded,
	},
	{
		name:     "aiosmtpd",
		busyCode: "450",
		recipe:   recipe{debs: []string{"python3-aiosmtpd"}},
		command:  []string{"/usr/bin/python3", "/etc/relay/server.py"},
		queued:   recorded,
	},
	{
		name:     "smtp-server",
		busyCode: "450",
		recipe: recipe{npm: []npmPackage{
			{name: "smtp-server", version: "3.21.6", versionNode18: "3.13.6", newestNeedNode: 20},
		}},
		command: []string{"node", "/etc/relay/server.js"},
		queued:  recorded,
	},
	{
		// nginx's mail proxy in front of Postfix. It offers CHUNKING if configured to, does not implement BDAT, and answers the
		// envelope itself up to the first recipient.
		name:     "nginx",
		busyCode: "450",
		recipe:   recipe{debs: []string{"nginx", "libnginx-mod-mail", "postfix"}},
		command:  []string{"/bin/sh", "-c", "/usr/sbin/postfix start && exec /usr/sbin/nginx"},
		users:    []string{"postfix", "postdrop"},
		folders: []folder{
			{"var/lib/postfix", "postfix", "postfix", 0o755}, {"var/spool/postfix", "root", "root", 0o755},
			{"var/log/nginx", "root", "root", 0o755}, {"var/lib/nginx", "root", "root", 0o755},
		},
		prepare: forgetMaster,
		queued:  postfixQueue,
		log:     "/var/log/nginx-error.log",

		// No TLS, no limits, and MAIL is refused only at RCPT.
		onlyChecks: []string{
			"one message", "queue ID", "200 messages at once", "200 through SendAll", "overlap", "QUIT right after the dot", "our own limits",
			"too many recipients", "one of three refused", "one of three busy", "all refused", "all or nothing", "too big",
			"too big, size unknown", "nearly too big", "line ends and dots", "8-bit body", "null reverse-path", "cut after the dot",
			"cut before the dot", "body fails half-way", "cancelled in a body", "Shutdown under load", "relay restarted",
			"a body of commands", "how bodies go",
		},
	},
	goSMTP("0.24.0"),
	goSMTP("0.25.0"),
	goSMTP("0.25.1"),
	goSMTP("0.26.0"),
}

// goSMTP is go-smtp's own server. Versions differ in whether they discard the octets of a chunk that they refuse.
func goSMTP(version string) relay {
	return relay{
		name:       "go-smtp-" + version,
		busyCode:   "450",
		recipe:     recipe{goSMTP: version},
		command:    []string{"/etc/relay/server"},
		queued:     recorded,
		noMaxConns: "go-smtp has no limit of connections",
		noMaxMails: "go-smtp has no limit of messages",
	}
}

func preparePostfix(r *running) error {
	if err := runIn(r.root, "/bin/sh", "-c",
		`echo "$1" | /usr/sbin/saslpasswd2 -p -c -u relay.example "$2" && chown postfix: /etc/sasldb2`, "sh", password, user); err != nil {
		return err
	}
	return forgetMaster(r)
}

// forgetMaster removes what a killed Postfix leaves behind.
func forgetMaster(r *running) error {
	return os.Remove(filepath.Join(r.root, "var/spool/postfix/pid/master.pid"))
}

// running is a relay in its root, started or stopped.
type running struct {
	relay
	settings
	root    string
	version string
	habit   habit // its replies to the probe for refused chunks
	output  bytes.Buffer
	cmd     *exec.Cmd
	gone    chan struct{} // closed when the process has ended
}

// install creates a root for the relay and writes its configuration; start runs it.
func install(b *box, f fetched, rel relay, certs *certificates) (*running, error) {
	root, err := b.newRoot(f, false)
	if err != nil {
		return nil, err
	}
	r := &running{relay: rel, root: root, version: f.Version}
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	r.settings = settings{
		Plain: ports[0], StartTLS: ports[1], Implicit: ports[2],
		MaxConns: limits.MaxConns, MaxMessages: limits.MaxMessages, MaxRecipients: limits.MaxRecipients,
		MaxSize: limits.MaxSize, IdleSeconds: limits.IdleSeconds,
		User: user, Password: password, Cert: "/etc/relay/cert.pem", Key: "/etc/relay/key.pem", Record: recordFile,
	}
	asJSON, err := json.Marshal(r.settings)
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		path    string
		content []byte
	}{
		{r.Cert, certs.cert},
		{r.Key, certs.key},
		{"/etc/relay/settings.json", asJSON},
		{"/etc/hosts", []byte("127.0.0.1 localhost\n")},
		{"/etc/resolv.conf", nil},
	} {
		if err := writeFile(root, f.path, f.content, 0o644); err != nil {
			return nil, err
		}
	}
	// Exim reads the key as its own user; OpenSMTPD accepts no world-readable key.
	key := filepath.Join(root, r.Key)
	if err := errors.Join(os.MkdirAll(filepath.Join(root, filepath.Dir(recordFile)), 0o755), os.Chown(key, 0, firstID),
		os.Chmod(key, 0o640)); err != nil {
		return nil, err
	}
	if f.Server != "" {
		program, err := os.ReadFile(f.Server)
		if err != nil {
			return nil, err
		}
		if err := writeFile(root, "/etc/relay/server", program, 0o755); err != nil {
			return nil, err
		}
	}
	if err := r.addUsers(); err != nil {
		return nil, err
	}
	if err := r.writeConfiguration(); err != nil {
		return nil, err
	}
	if r.prepare != nil {
		if err := r.prepare(r); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return r, nil
}

// firstID is the number of a relay's first user, and of its group.
const firstID = 64000

// addUsers does what the packages' installation scripts would do.
func (r *running) addUsers() error {
	ids := map[string]int{"root": 0}
	for i, name := range r.users {
		id := firstID + i
		ids[name] = id
		for file, line := range map[string]string{
			"etc/passwd": fmt.Sprintf("%s:x:%d:%d::/nonexistent:/usr/sbin/nologin\n", name, id, id),
			"etc/group":  fmt.Sprintf("%s:x:%d:\n", name, id),
		} {
			path := filepath.Join(r.root, file)
			old, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			var kept []byte
			for l := range bytes.Lines(old) {
				if !bytes.HasPrefix(l, []byte(name+":")) {
					kept = append(kept, l...)
				}
			}
			if err := os.WriteFile(path, append(kept, line...), 0o644); err != nil {
				return err
			}
		}
	}
	for _, f := range r.folders {
		path := filepath.Join(r.root, f.path)
		// Do not read or count what the machine's own relay has queued.
		if err := errors.Join(os.RemoveAll(path), os.MkdirAll(path, 0o755), os.Chown(path, ids[f.owner], ids[f.group]),
			os.Chmod(path, f.mode)); err != nil {
			return err
		}
	}
	return nil
}

// writeConfiguration fills in the files of conf/NAME, which is laid out like the root.
func (r *running) writeConfiguration() error {
	base := "conf/" + r.name
	if _, err := fs.Stat(conf, base); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fs.WalkDir(conf, base, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := conf.ReadFile(path)
		if err != nil {
			return err
		}
		t, err := template.New(path).Delims("%{", "}%").Option("missingkey=error").Parse(string(text))
		if err != nil {
			return err
		}
		var out bytes.Buffer
		if err := t.Execute(&out, r.settings); err != nil {
			return err
		}
		return writeFile(r.root, strings.TrimPrefix(path, base), out.Bytes(), 0o644)
	})
}

// writeFile replaces the file at path, even if it is a link: its target may be mounted from the machine.
func writeFile(root, path string, content []byte, mode fs.FileMode) error {
	path = filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.WriteFile(path, content, mode)
}

// start runs the relay and waits until it greets.
func (r *running) start() error {
	cmd, err := startIn(r.root, r.command, &r.output)
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	r.cmd, r.gone = cmd, gone
	go func() { // ends when the process has ended
		cmd.Wait()
		close(gone)
	}()
	for _, port := range []int{r.Plain, r.StartTLS, r.Implicit} {
		if err := r.waitListening(port, time.Now().Add(30*time.Second)); err != nil {
			r.stop()
			return err
		}
	}
	return nil
}

func (r *running) waitListening(port int, deadline time.Time) error {
	for time.Now().Before(deadline) {
		select {
		case <-r.gone:
			return fmt.Errorf("the relay ended before it listened:\n%s", r.tail())
		case <-time.After(50 * time.Millisecond):
		}
		if port == r.Plain {
			if greets(port) {
				return nil
			}
		} else if c, err := net.Dial("tcp", address(port)); err == nil {
			c.Close()
			return nil
		}
	}
	return fmt.Errorf("the relay does not listen on port %d:\n%s", port, r.tail())
}

func greets(port int) bool {
	c, err := net.Dial("tcp", address(port))
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	var line [3]byte
	if _, err := c.Read(line[:]); err != nil || string(line[:]) != "220" {
		return false
	}
	// A close without QUIT would count as a fault in the relay's logs and counters.
	fmt.Fprintf(c, "QUIT\r\n")
	var rest [512]byte
	for {
		if _, err := c.Read(rest[:]); err != nil {
			return true
		}
	}
}

func address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// stop kills the relay with all of its processes.
func (r *running) stop() {
	r.cmd.Process.Kill()
	<-r.gone
}

// restart kills the relay at any moment and starts it again on the same ports.
func (r *running) restart() error {
	r.stop()
	if r.prepare != nil {
		os.Remove(filepath.Join(r.root, "var/spool/postfix/pid/master.pid"))
	}
	return r.start()
}

// tail is the end of the relay's log.
func (r *running) tail() string {
	text := r.output.String()
	if r.log != "" {
		b, _ := os.ReadFile(filepath.Join(r.root, r.log))
		text += string(b)
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-30):], "\n")
}

// process is one of the relay's processes.
type process struct {
	pid   int
	name  string
	first bool // the one that start started
}

// processes finds the relay's processes by their root.
func (r *running) processes() ([]process, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		root, err := os.Readlink(filepath.Join("/proc", d.Name(), "root"))
		if err != nil || root != r.root && !strings.HasPrefix(root, r.root+"/") {
			continue // another root, or ended
		}
		name, err := os.ReadFile(filepath.Join("/proc", d.Name(), "comm"))
		if err != nil {
			continue // just ended
		}
		all = append(all, process{pid: pid, name: strings.TrimSpace(string(name)), first: pid == r.cmd.Process.Pid})
	}
	return all, nil
}

// killSessions kills the processes that serve sessions, and returns how many.
func (r *running) killSessions() (int, error) {
	all, err := r.processes()
	if err != nil {
		return 0, err
	}
	all = slices.DeleteFunc(all, func(p process) bool { return !r.session(p) })
	for _, p := range all {
		if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return 0, err
		}
	}
	return len(all), nil
}

// freePorts finds unused ports. In the suite's own network all are unused.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // closed after the last: no port twice
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}
