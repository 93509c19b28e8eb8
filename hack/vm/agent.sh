# The guest's first process after switch_root. Reads commands, one a line, and
# answers each with its output and a line that says how it ended.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
stty raw -echo
ip link set lo up
echo "@ ready"
while read -r command; do
	sh -c "$command" </dev/null 2>&1
	printf '\n@ exit %d\n' $?
done
